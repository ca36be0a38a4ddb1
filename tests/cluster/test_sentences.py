"""What a cluster lacks is said when a notebook connects, before anything trains: what, where, and what to do."""

import os

import pytest

from cluster.on_hosts import notebook, python, started
from hosts import HEAD

pytestmark = pytest.mark.cluster
CONNECT = """
import time

import ray

from helpers import cluster

{before}
start = time.monotonic()
try:
    cluster.connect()
    {then}
    print("connected")
except cluster.ClusterError as error:
    print(error)
assert time.monotonic() - start < 60
"""


@pytest.fixture(scope="module")
def odd_hosts():
    """Two hosts without a common folder, whose names lead to 127.0.1.1, and whose Ray asks for no token."""
    yield from started(2, bucket=True, shared=False, loopback_names=True, token=False)


def connect(hosts, variables, before="", then=""):
    return python(hosts, CONNECT.format(before=before, then=then), timeout=120, **variables)


@pytest.mark.parametrize("storage", ["folder", "bucket", "uri"])
def test_connect_finds_nothing_wrong(hosts, storage):
    assert connect(hosts, notebook(hosts, storage)) == "connected\n"
    leftovers = [file for file in hosts.folder.rglob("*") if "seen-by-all" in file.name]
    assert not leftovers


def test_connect_names_a_host_that_can_not_see_the_folder(odd_hosts):
    printed = connect(odd_hosts, notebook(odd_hosts, "folder"))
    assert f"The machine host2 can't see the storage folder {odd_hosts.folder}/storage: set TUTORIAL_STORAGE" in printed


def test_connect_names_a_host_that_can_not_write_to_the_folder(hosts):
    hosts.run(3, ["mount", "--bind", hosts.folder, hosts.folder])
    hosts.run(3, ["mount", "-o", "remount,bind,ro", hosts.folder])
    try:
        printed = connect(hosts, notebook(hosts, "folder"))
    finally:
        hosts.run(3, ["umount", hosts.folder])
    assert "The machine host3 can't write" in printed and "change its permissions" in printed


def test_connect_names_a_host_that_can_not_reach_the_bucket(hosts):
    hosts.block(3)
    try:
        printed = connect(hosts, notebook(hosts, "bucket"))
    finally:
        hosts.unblock(3)
    assert "The machine host3 can't write" in printed and "credentials, such as AWS_*" in printed


def test_connect_names_hosts_without_credentials(hosts):
    """A notebook that joined without `cluster.connect()` has sent none."""
    printed = connect(hosts, notebook(hosts, "bucket"), before=f"ray.init('{HEAD}', log_to_driver=False)")
    assert "The machine host" in printed and "can't write" in printed and "credentials, such as AWS_*" in printed


def test_connect_names_a_host_that_is_silent(hosts):
    hosts.unplug(3)
    try:
        printed = connect(hosts, notebook(hosts, "folder"))
    finally:
        hosts.restart(3)
    # Unless Ray has noticed by then, and goes on with two hosts.
    assert "The machine host3 belongs to this Ray and does not answer" in printed or printed == "connected\n"


@pytest.mark.parametrize(
    "variables",
    [{"HOME": "/nonexistent"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["none", "wrong"],
)
def test_connect_asks_for_the_token(hosts, variables):
    printed = connect(hosts, notebook(hosts, "folder", **{"RAY_AUTH_MODE": None, **variables}))
    assert "wants a token, and this notebook has none or another: copy ~/.ray/auth_token" in printed


def test_connect_names_another_version_of_ray(hosts):
    printed = connect(hosts, notebook(hosts, "folder"), before='ray.__version__ = "2.59.0"')
    assert "The cluster runs Ray 2.60.0 on Python" in printed and "this notebook Ray 2.59.0 on" in printed


def test_connect_names_a_host_with_another_torch(odd_hosts, tmp_path):
    metadata = tmp_path / "torch-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    odd_hosts.restart(2, PYTHONPATH=":".join(paths))
    printed = connect(odd_hosts, notebook(odd_hosts, "bucket"))
    assert "The machine host2 has torch 9.9.9, and this one" in printed


def test_build_trainer_leaves_a_cpu_for_data_tasks(hosts):
    build = "from helpers import trainer; trainer.build_trainer()"
    printed = connect(hosts, notebook(hosts, "folder", TUTORIAL_WORKERS="6"), then=build)
    assert "6 workers need all 6 CPU of this Ray and leave none for the tasks that read their data" in printed
