"""Runs all lessons in order and builds the report from them: `make run`. Opens JupyterLab on them: `make lab`."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import ray
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

import build_site
from helpers import _ray_internals, cluster, evaluation, settings


def run_all(project: Path = settings.PROJECT) -> None:
    """Execute every lesson, build the report, and print the trained model's test accuracy as the last line.

    Raises:
        SystemExit: a lesson failed; the message says where to read what it printed. Or the report can't be built.
    """
    make_paths_absolute()
    cfg = settings.load()
    lessons = sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    executed = project / build_site.EXECUTED
    shutil.rmtree(executed.parent, ignore_errors=True)
    executed.mkdir(parents=True)
    seconds, started = {}, time.monotonic()
    print(f"Running {len(lessons)} lessons on {cfg.data_name}, {cfg.epochs} epochs. Starting Ray …", flush=True)
    with shared_ray():
        for lesson in lessons:
            print(f"{lesson.stem} …", end=" ", flush=True)
            begin = time.monotonic()
            error = execute(lesson, executed / lesson.name)
            seconds[lesson.stem] = time.monotonic() - begin
            print(f"failed after {seconds[lesson.stem]:.0f} s\n\n{error}" if error else f"{seconds[lesson.stem]:.0f} s")
            if error:
                raise SystemExit(f"{lesson.stem} failed; {build_site.EXECUTED}/{lesson.name} holds what it printed.")
    result = evaluation.latest(cfg)
    (executed / build_site.RUN).write_text(json.dumps({"result": result, "seconds": seconds}, indent=2))
    page = build_site.build(project).relative_to(project)
    print(f"All lessons took {(time.monotonic() - started) / 60:.1f} minutes. The report is {page}.")
    print(f"test accuracy {result['accuracy']:.3f} ({result['data']}, {result['epochs']} epochs)")


@contextlib.contextmanager
def shared_ray():
    """Keep one local Ray running for all notebooks started inside this context; they find it by `RAY_ADDRESS`."""
    if os.environ.get("RAY_ADDRESS"):  # that cluster is used, and nothing is started
        yield
        return
    cluster.connect()
    workers = cluster.scaling_config().num_workers
    threading.Thread(target=_ray_internals.prestart_workers, args=[workers], daemon=True).start()
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        cluster.disconnect()


def make_paths_absolute() -> None:
    """Rewrite relative paths in TUTORIAL_* variables, because the lessons run in another folder."""
    cfg = settings.load()
    for variable in settings.env_overrides():
        name = variable.removeprefix("TUTORIAL_").lower()
        if name in ("data", "storage", "cifar10_archive"):
            os.environ[variable] = getattr(cfg, name)


def execute(lesson: Path, executed: Path) -> str | None:
    """Execute one lesson, write it with its outputs to `executed`, and return its error's text, or None."""
    notebook = nbformat.read(lesson, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,
        resources={"metadata": {"path": str(lesson.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # or each kernel warns about its local port
        coalesce_streams=True,  # or a table printed line by line becomes as many outputs
    )
    try:
        client.execute()
        return None
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except (CellControlSignal, DeadKernelError) as error:  # a cell that takes too long, a kernel that was killed
        return f"{type(error).__name__}: {error}"
    finally:
        nbformat.write(notebook, executed)


def lab(options: list[str]) -> None:
    """Open JupyterLab on the lessons, with one Ray running for all of them; both end together."""
    make_paths_absolute()
    print("Starting Ray for all lessons, then JupyterLab …", flush=True)
    with shared_ray():
        jupyter = [sys.executable, "-m", "jupyter"]
        # JupyterLab would ask whether it may fetch news from the network.
        news = "@jupyterlab/apputils-extension:announcements"
        subprocess.run([*jupyter, "labextension", "disable", "--level=sys_prefix", news], capture_output=True)
        command = [*jupyter, "lab", f"--notebook-dir={settings.PROJECT / 'notebooks'}"]
        process = subprocess.Popen([*command, "--LabApp.default_url=/lab/tree/00_start_here.ipynb", *options])
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # or JupyterLab would outlive this process
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                continue  # JupyterLab got it too, and asks whether to stop


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["run", "lab"], default="run", help="options of JupyterLab follow")
    arguments, jupyterlab_options = parser.parse_known_args()
    if arguments.what == "lab":
        lab(jupyterlab_options)
    elif jupyterlab_options:
        parser.error(f"unknown options: {' '.join(jupyterlab_options)}")
    else:
        run_all()
