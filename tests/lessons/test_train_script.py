"""The core path as one script, `notebooks/train.py`: killed after its first checkpoint, it resumes under its name."""

import contextlib
import os
import re
import subprocess
import sys

import torch
from ray.train import Result

from support import NOTEBOOKS, wait_for

EPOCHS = 3


def start(storage, log):
    """Start the script as a learner does, with a Ray of its own and its output in the file `log`."""
    command = [sys.executable, "train.py", "--name", "killed", "--storage", str(storage), "--epochs", str(EPOCHS)]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=NOTEBOOKS, env=env, stdout=output, stderr=subprocess.STDOUT)


def latest_checkpoint(storage):
    """The run's latest checkpoint as a new process would find it, or None."""
    with contextlib.suppress(Exception):  # there is no such run yet, or its list is just being written
        return Result.from_path(storage / "killed").checkpoint


def test_train_script_resumes_after_it_was_killed(tmp_path):
    storage, first_log, second_log = tmp_path / "runs", tmp_path / "first.txt", tmp_path / "second.txt"
    first = start(storage, first_log)
    try:
        wait_for(
            lambda: latest_checkpoint(storage) or first.poll() is not None, "no checkpoint was written", seconds=300
        )
    finally:
        first.kill()
        first.wait()
    assert latest_checkpoint(storage), first_log.read_text()
    with latest_checkpoint(storage).as_directory() as folder:
        epochs_kept = torch.load(f"{folder}/states.pt", weights_only=True)["epochs"]

    second = start(storage, second_log)
    try:
        assert second.wait(timeout=300) == 0, second_log.read_text()
    finally:
        second.kill()
    output = second_log.read_text()
    trained = {int(epoch) for epoch in re.findall(rf"epoch (\d+)/{EPOCHS}: ", output)}
    assert epochs_kept >= 1 and trained == set(range(epochs_kept + 1, EPOCHS + 1)), output
    assert float(re.search(r"test accuracy (\S+) \(killed, ", output)[1]) > 0.9, output
