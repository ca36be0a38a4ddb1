"""A killed worker, node or driver costs steps, never an epoch; and nothing that a lesson starts outlives it."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jupyter_client
import pytest
import ray
from conftest import ray_processes
from ray._common.utils import get_ray_address_file
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from helpers import cluster, faults, nodes, settings

# What a reader runs in a cell, printing what the test waits for.
FIT = """
from helpers import cluster, data, faults, progress
cluster.connect()
data.prepare()
trainer = faults.build_short_trainer(faults.new_name(), max_failures=0, num_epochs=EPOCHS)
print("fitting", trainer.run_config.name, "now")
with progress.shown(trainer):
    history = trainer.fit().return_value
print("epochs", [metrics["epoch"] for metrics in history])
"""


@pytest.fixture(scope="module")
def undisturbed():
    return faults.build_short_trainer(faults.new_name(), max_failures=0).fit().return_value


def assert_same(history, undisturbed):
    assert [metrics["epoch"] for metrics in history] == [0, 1, 2]
    for killed, calm in zip(history, undisturbed, strict=True):
        assert killed == pytest.approx(calm, rel=1e-3)


def test_a_killed_worker_goes_on_from_the_checkpoint(undisturbed):
    diary = ray.remote(faults.Diary).options(num_cpus=0).remote([8])
    trainer = faults.build_short_trainer(faults.new_name(), max_failures=1, train_loop=faults.with_faults(diary))
    result = trainer.fit()
    steps = [page["step"] for page in ray.get(diary.read.remote())]
    ray.kill(diary)
    assert steps == [*range(1, 9), *range(7, 10)], "it should go on after step 6, the end of the second epoch"
    assert_same(result.return_value, undisturbed)


def test_without_failures_allowed_the_error_says_what_happened():
    diary = ray.remote(faults.Diary).options(num_cpus=0).remote([2])
    trainer = faults.build_short_trainer(faults.new_name(), max_failures=0, train_loop=faults.with_faults(diary))
    with pytest.raises(ray.train.TrainingFailedError, match="died|killed|SIGKILL"):
        trainer.fit()
    ray.kill(diary)


def test_a_killed_driver_is_gone_on_from_after_a_death_without_a_checkpoint_too(undisturbed):
    name = faults.new_name()
    diary = ray.remote(faults.Diary).options(name=name, namespace="faults", num_cpus=0).remote([1])
    driver = subprocess.run([sys.executable, "-m", "helpers.faults", name], capture_output=True, text=True)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    steps = [page["step"] for page in ray.get(diary.read.remote())]
    ray.kill(diary)
    assert steps[:5] == [1, *range(1, 4), 4][: len(steps)] and len(steps) >= 4, "no checkpoint: it should start over"
    resumed = faults.build_short_trainer(name, max_failures=0).fit()
    assert_same(resumed.return_value, undisturbed)


def test_a_killed_node_is_gone_on_without(undisturbed):
    # In a process of its own: the Ray that all tests share belongs to this one and would end with its connection.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as another:
        history, pages, announced = another.submit(train_while_a_node_dies).result()
    assert len(announced) == 1, "a lesson that is killed would leave the address of a dead Ray as that of the newest"
    assert len({page["node"] for page in pages}) == 2, "training did not move to another node"
    steps = [page["step"] for page in pages]
    assert steps == [*range(1, 6), *range(4, 10)], "it should go on after step 3, the end of the first epoch"
    assert [metrics["epoch"] for metrics in history] == [0, 1, 2]
    # Two workers share out the pictures otherwise than one, and each normalises by half a batch.
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["train_loss"] == pytest.approx(undisturbed[-1]["train_loss"], abs=0.5)


def announced_ray():
    file = Path(get_ray_address_file(None))
    return file.read_text() if file.exists() else None


def train_while_a_node_dies():
    announced = {announced_ray()}
    machines = nodes.Nodes(2)
    announced.add(announced_ray())
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        diary = ray.remote(faults.Diary).options(num_cpus=0, scheduling_strategy=here).remote([5])
        two = ray.train.ScalingConfig(num_workers=2, placement_strategy="SPREAD")
        trainer = faults.build_short_trainer(faults.new_name(), 2, faults.with_faults(diary, nodes.lose_power), two)
        return trainer.fit().return_value, ray.get(diary.read.remote()), announced
    finally:
        machines.stop()


def test_a_folder_that_another_machine_cannot_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    cluster.require_shared(str(tmp_path))  # here every node does see it
    cluster.require_shared("s3://bucket/anywhere")
    hidden = contextlib.nullcontext(types.SimpleNamespace(name=str(tmp_path / "seen-by-nobody")))
    monkeypatch.setattr(cluster.tempfile, "NamedTemporaryFile", lambda **_: hidden)
    with pytest.raises(cluster.ClusterError, match="can't see the storage folder .*: set TUTORIAL_STORAGE to a folder"):
        cluster.require_shared(str(tmp_path))


# --- kernels ---


@pytest.fixture
def kernel():
    """Start kernels as JupyterLab does; they and their processes must be gone at the end."""
    started = []

    def start(**environment):
        manager = jupyter_client.KernelManager()
        manager.start_kernel(env={**os.environ, **environment}, cwd=settings.PROJECT / "notebooks")
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        started.append((manager, client))
        return manager, client

    yield start
    for manager, client in started:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def outputs(client, message_id, until=None):
    """Collect what a cell prints, to its end or to the first output that holds `until`; also its error's name."""
    printed, error = "", None
    while True:
        message = client.get_iopub_msg(timeout=240)
        if message["parent_header"].get("msg_id") != message_id:
            continue
        if message["msg_type"] == "stream":
            printed += message["content"]["text"]
            if until and until in printed:
                return printed, None
        elif message["msg_type"] == "error":
            error = message["content"]["ename"]
        elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return printed, error


@pytest.mark.parametrize("moment", ["while processes start", "while it trains"])
def test_interrupted_fit_can_be_run_again_and_leaves_nothing(kernel, monkeypatch, moment):
    before = ray_processes()
    monkeypatch.delenv("RAY_ADDRESS")  # a Ray of the kernel's own, whose end can be watched
    manager, client = kernel()
    message = client.execute(FIT.replace("EPOCHS", "30"))
    printed, _ = outputs(client, message, until="now")
    name = printed.split("fitting ")[1].split()[0]
    if moment == "while it trains":
        reports = Path(settings.load().path("runs", name, "reports"))
        wait_for(lambda: reports.is_dir() and any(reports.iterdir()))
    else:
        time.sleep(3)
    manager.interrupt_kernel()
    printed, error = outputs(client, message)
    assert error == "KeyboardInterrupt" and "epochs" not in printed
    printed, error = outputs(client, client.execute(FIT.replace("EPOCHS", "3")))
    assert error is None and "epochs [0, 1, 2]" in printed
    mine = ray_processes() - before
    assert mine, "the kernel's own Ray was expected"
    outputs(client, client.execute("cluster.disconnect()"))
    wait_for(lambda: not mine & ray_processes(), "processes were left running")


def wait_for(condition, otherwise="it never came true"):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def test_two_lessons_open_at_once_both_finish(kernel):
    pairs = [kernel() for _ in range(2)]
    messages = [client.execute(FIT.replace("EPOCHS", "3")) for _, client in pairs]
    for (_, client), message in zip(pairs, messages, strict=True):
        printed, error = outputs(client, message)
        assert error is None and "epochs [0, 1, 2]" in printed
