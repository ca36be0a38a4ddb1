"""Hosts are separate machines as far as Ray can tell, and nothing is left of them."""

import subprocess
from pathlib import Path

import psutil
import pytest

from hosts import Hosts, unavailable

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(unavailable()), reason=unavailable())]


def traces(name):
    """What there is on this machine of hosts called `name`: namespaces, mounts, processes, folders."""
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    found = [one for one in namespaces + Path("/proc/mounts").read_text().split() if name in one]
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        told = " ".join([*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()])
        if f"/tmp/{name}" in told and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found + list(Path("/tmp").glob(name))


def test_hosts_have_their_own_names_memory_and_network_and_leave_nothing():
    with Hosts(2, ray=False, bucket=True) as hosts:
        name = hosts.root.name
        assert traces(name)
        assert [hosts.run(host, ["hostname"]).stdout.strip() for host in (1, 2)] == ["host1", "host2"]
        hosts.run(1, ["touch", "/dev/shm/mine", hosts.folder / "ours"])
        assert hosts.run(2, ["ls", "/dev/shm", hosts.folder]).stdout.split() == [
            "/dev/shm:",
            f"{hosts.folder}:",
            "ours",
        ]
        assert reaches(hosts, 1, "host2")
        hosts.unplug(2)
        assert not reaches(hosts, 1, "host2")
        hosts.plug(2)
        assert reaches(hosts, 1, "host2")
        hosts.start(2, ["sleep", "600"])
        hosts.kill(2)
        assert hosts.run(2, ["hostname"]).stdout.strip() == "host2"
    assert not traces(name)


def test_hosts_two_groups_do_not_meet():
    with Hosts(1, ray=False) as one, Hosts(1, ray=False, shared=False, loopback_names=True) as another:
        one.run(1, ["touch", one.folder / "file"])
        another.run(1, ["touch", another.folder / "file"])
        assert (one.folder / "file").exists() and not (another.folder / "file").exists()
        assert "127.0.1.1 host1" in another.run(1, ["cat", "/etc/hosts"]).stdout


def reaches(hosts, host, name):
    """Whether a host can open a connection to another, which refuses it."""
    code = f"import socket; print(socket.socket().connect_ex(('{name}', 9)))"
    done = hosts.run(host, ["timeout", "4", "python3", "-c", code])
    return done.stdout.strip() == "111"  # refused by that host
