"""Ray Serve on this machine alone: start it or join it, find an application's address, and leave nothing behind."""

import contextlib
import logging
import os
import socket

import psutil
import requests
from ray import serve

from helpers import settings

PORTS = range(8000, 8050)  # Serve's own default is the first
NAME = f"classifier-{socket.gethostname()}"


def start() -> str:
    """Start Ray Serve on 127.0.0.1 at the first free port, or join this Ray's; return a new application's name.

    What a notebook that died on this machine has left behind is deleted.
    """
    logging.getLogger("ray.serve").setLevel(logging.INFO if settings.load().logs == "verbose" else logging.ERROR)
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = f"127.0.0.1,{others}"  # a proxy for the web can't reach this machine's loopback
    serve.start(http_options={"host": "127.0.0.1", "port": next(filter(_is_free, PORTS))})
    delete_orphans()
    return f"{NAME}-{os.getpid()}"


def delete_orphans() -> None:
    """Delete the applications of notebooks on this machine that died before they could."""
    for name in serve.status().applications:
        prefix, _, process = name.rpartition("-")
        if prefix == NAME and not psutil.pid_exists(int(process)):
            serve.delete(name)


def address(name: str) -> str:
    """Return the URL of the application `name`, by asking each port which applications it leads to."""
    for port in PORTS:
        with contextlib.suppress(requests.RequestException):  # nobody listens there, or another program
            if name in requests.get(f"http://127.0.0.1:{port}/-/routes", timeout=5).json().values():
                return f"http://127.0.0.1:{port}/{name}"
    raise RuntimeError(f"No port of this machine leads to {name}: run the notebook where Ray's head runs.")


def stop(name: str) -> None:
    """Delete the application `name`, and end Ray Serve unless another notebook's application still runs."""
    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False
