"""A killed worker or driver costs steps, never an epoch; and nothing that a lesson starts outlives it."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jupyter_client
import pytest
import ray

from helpers import cluster, faults, settings
from support import ray_processes, wait_for

pytestmark = pytest.mark.usefixtures("shared_ray")

# What a learner runs in a cell, printing what the test waits for.
FIT = """
from helpers import cluster, faults
from helpers.progress import show_progress
cluster.connect()
trainer = faults.build_short_trainer(faults.unique_run_name(), max_failures=0, num_epochs=EPOCHS)
print("run", trainer.run_config.name, "starts")
with show_progress(trainer):
    history = trainer.fit().return_value
print("epochs", [metrics["epoch"] for metrics in history])
"""


@pytest.fixture(scope="module")
def undisturbed(shared_ray):
    return faults.build_short_trainer(faults.unique_run_name(), max_failures=0).fit().return_value


@pytest.fixture
def step_log(request):
    """Start a step log with the steps, and the actor's name if there is one, that the test is parametrized with."""
    kill_after_steps, name = request.param
    actor = ray.remote(faults.StepLog).options(name=name, namespace="faults", num_cpus=0).remote(kill_after_steps)
    yield actor
    ray.kill(actor)


def steps_in(step_log):
    return [entry["step"] for entry in ray.get(step_log.entries.remote())]


def assert_same_losses(history, undisturbed):
    assert [metrics["epoch"] for metrics in history] == [0, 1, 2]
    tolerance = 0.1 if cluster.scaling_config().use_gpu else 1e-4  # a GPU adds in varying order
    expected = [metrics["train_loss"] for metrics in undisturbed]
    assert [metrics["train_loss"] for metrics in history] == pytest.approx(expected, rel=tolerance)


def test_step_log_kills_once_per_step():
    step_log = faults.StepLog([2])
    assert [step_log.record(1, "a", step) for step in (1, 2, 1, 2)] == [False, True, False, False]
    assert [entry["step"] for entry in step_log.entries()] == [1, 2, 1, 2]


def test_unique_run_name_is_never_the_same():
    assert faults.unique_run_name() != faults.unique_run_name()


def test_build_short_trainer_takes_three_steps_of_few_images(image_folder, monkeypatch):
    monkeypatch.setenv("TUTORIAL_DATA", str(image_folder))
    for workers in (1, 2):
        scaling_config = ray.train.ScalingConfig(num_workers=workers)
        trainer = faults.build_short_trainer("unused", max_failures=0, scaling_config=scaling_config)
        assert trainer.train_loop_config["steps_per_epoch"] == 3


@pytest.mark.parametrize("step_log", [([8], None)], indirect=True)
def test_fit_resumes_after_worker_killed(undisturbed, step_log):
    trainer = faults.build_short_trainer(faults.unique_run_name(), 1, faults.inject_faults(step_log))
    history = trainer.fit().return_value
    assert steps_in(step_log) == [*range(1, 9), *range(7, 10)], "it should resume after step 6, the end of epoch 2"
    assert_same_losses(history, undisturbed)


@pytest.mark.parametrize("step_log", [([2], None)], indirect=True)
def test_fit_raises_when_no_failure_is_allowed(step_log):
    trainer = faults.build_short_trainer(faults.unique_run_name(), 0, faults.inject_faults(step_log))
    with pytest.raises(ray.train.TrainingFailedError, match="died|killed|SIGKILL"):
        trainer.fit()


@pytest.mark.parametrize("step_log", [([1, 4], "killed-driver")], indirect=True)
def test_fit_resumes_after_driver_killed(undisturbed, step_log):
    command = [sys.executable, settings.PROJECT / "notebooks" / "dying_driver.py", "killed-driver"]
    driver = subprocess.run(command, capture_output=True, text=True)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    # Killed after step 1, without a checkpoint, it starts over; then the driver dies with the first checkpoint stored.
    assert steps_in(step_log) in ([1, 1, 2, 3], [1, 1, 2, 3, 4])
    assert_same_losses(faults.build_short_trainer("killed-driver", max_failures=0).fit().return_value, undisturbed)


@pytest.mark.parametrize("logs", ["quiet", "verbose"])
def test_show_worker_logs_decides_what_killed_workers_print(logs):
    code = """
        import os, signal, time
        import ray
        from helpers import cluster

        @ray.remote(num_cpus=0)
        class Killed:
            def kill(self):
                print("last words", flush=True)
                time.sleep(2)  # Ray reads its workers' logs every now and then
                os.kill(os.getpid(), signal.SIGKILL)

        cluster.connect()
        try:
            ray.get(Killed.remote().kill.remote())
        except ray.exceptions.RayActorError:
            time.sleep(3)  # what the raylet has to say comes later
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "TUTORIAL_LOGS": logs}
    driver = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if logs == "quiet":
        assert driver.stdout == driver.stderr == ""
    else:
        assert "last words" in driver.stdout + driver.stderr
        assert re.search("worker died", driver.stdout + driver.stderr)


# --- kernels ---


@pytest.fixture
def kernel():
    """Start kernels as JupyterLab does; they and their processes must be gone at the end."""
    started = []

    def start():
        manager = jupyter_client.KernelManager()
        manager.start_kernel(env=dict(os.environ), cwd=settings.PROJECT / "notebooks")
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


def test_fit_interrupted_can_run_again_and_leaves_no_process(kernel, monkeypatch):
    before = ray_processes()
    monkeypatch.delenv("RAY_ADDRESS")  # a Ray of the kernel's own, whose end can be watched
    manager, client = kernel()
    message = client.execute(FIT.replace("EPOCHS", "30"))
    printed, _ = outputs(client, message, until="starts")
    name = re.search(r"run (\S+) starts", printed)[1]
    reports = Path(settings.load().path("runs", name, "reports"))
    wait_for(lambda: reports.is_dir() and any(reports.iterdir()), seconds=240)
    manager.interrupt_kernel()
    printed, error = outputs(client, message)
    assert error == "KeyboardInterrupt" and "epochs" not in printed
    printed, error = outputs(client, client.execute(FIT.replace("EPOCHS", "3")))
    assert error is None and "epochs [0, 1, 2]" in printed
    mine = ray_processes() - before
    assert mine, "the kernel's own Ray was expected"
    outputs(client, client.execute("cluster.disconnect()"))
    wait_for(lambda: not mine & ray_processes(), "processes were left running")


def test_fit_in_two_lessons_at_once_finishes_in_both(kernel):
    clients = [kernel()[1] for _ in range(2)]
    messages = [client.execute(FIT.replace("EPOCHS", "3")) for client in clients]
    for client, message in zip(clients, messages, strict=True):
        printed, error = outputs(client, message)
        assert error is None and "epochs [0, 1, 2]" in printed
