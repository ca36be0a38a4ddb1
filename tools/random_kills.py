"""Kills a worker, a node or the driver of a run at a random moment, and checks what comes of it, many times.

python tools/random_kills.py [number of runs] [first seed]: every run must end with each epoch once, each image once in
each epoch, and no process left; a run that fails can be repeated by its seed. Their losses must be like those of ten
undisturbed runs: none far above them, and not higher as a whole (a one-sided Mann-Whitney test at 1 %).
"""

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pyarrow as pa
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from scipy.stats import mannwhitneyu

from helpers import cluster, data, nodes, settings
from helpers._ray_internals import is_ray_process
from helpers.data_config import rest_of_epoch
from helpers.faults import unique_run_name
from helpers.mid_epoch import train_loop_mid_epoch
from helpers.preprocessing import image_ids
from helpers.trainer import build_train_loop_config

VICTIMS = ("worker", "node", "driver")
MARK = "RANDOM_KILLS_RUN"  # a variable that all processes of a run inherit, so that they can be told from others
NUM_EPOCHS = 3
# Ray 2.60 does not retry when a worker dies in the moment in which its train loop is launched: in `_start_impl` of its
# class WorkerGroup, that `ray.get` stands after the `try`. Then `fit()` raises, and a new driver must resume the run.
NOT_RETRIED = 3


@dataclass
class Outcome:
    """What a run came to: the loss of its last epoch, seconds of `fit()`, and what was `stored` when a kill came."""

    loss: float
    seconds: float
    stored: str | None


def train(name: str, on_nodes: bool) -> None:
    """Train the run `name` with two workers, or resume it; print "fit" when it begins and a line of JSON at its end."""
    local_cluster = nodes.LocalCluster(2) if on_nodes else None
    cluster.connect()
    cfg = replace(settings.load(), batch_size=16)  # many short steps
    images = data.load("train").take_batch(24 * cfg.batch_size)
    ids, different = np.unique(image_ids(images["image"]), return_index=True)
    table = data.to_table(images["image"][different], images["label"][different], data.class_names())
    table = table.append_column("id", pa.array(ids))
    config = build_train_loop_config(ray.data.from_arrow(table), data.class_names(), 2, cfg)
    table = table.slice(0, config["steps_per_epoch"] * config["global_batch_size"])
    train_ds = ray.data.from_arrow([table.slice(start, 32) for start in range(0, len(table), 32)])
    trainer = TorchTrainer(
        train_loop_mid_epoch,
        train_loop_config={**config, "num_epochs": NUM_EPOCHS, "steps_per_checkpoint": 3},
        scaling_config=ScalingConfig(num_workers=2, placement_strategy="SPREAD"),
        run_config=RunConfig(
            storage_path=cfg.path("runs"),
            name=name,
            failure_config=FailureConfig(max_failures=5),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": train_ds, "rest": rest_of_epoch(train_ds, cfg.path("runs", name))},
    )
    print("fit", flush=True)
    start = time.monotonic()
    try:
        history = trainer.fit().return_value
    except ray.train.ControllerError:
        sys.exit(NOT_RETRIED)
    expected = Counter(table["id"].to_pylist())
    end = {
        "epochs": [metrics["epoch"] for metrics in history],
        "complete": [Counter(metrics["seen"]) == expected for metrics in history],
        "loss": history[-1]["train_loss"],
        "seconds": time.monotonic() - start,
    }
    print(json.dumps(end), flush=True)
    if local_cluster:
        local_cluster.stop()
    cluster.disconnect()


def start(name: str, victim: str | None, seed: int) -> subprocess.Popen:
    """Start a driver as a process of its own, with a Ray of its own, and return once it calls `fit()`."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {MARK: name, "TUTORIAL_SEED": str(seed)}
    command = [sys.executable, os.path.abspath(__file__), "train", name, str(victim)]
    errors = tempfile.TemporaryFile("w+", errors="replace")  # a pipe that nobody reads would stop the driver
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    driver.errors = errors
    for line in driver.stdout:
        if line == "fit\n":
            break
    return driver


def processes_of(name: str) -> list[psutil.Process]:
    """Return all of Ray's processes that belong to the run `name`."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        title = " ".join(process.info["cmdline"] or [])
        if (process.info["environ"] or {}).get(MARK) == name and is_ray_process(title):
            found.append(process)
    return found


def latest_checkpoint(name: str) -> str:
    """Say in words what the latest checkpoint of the run `name` holds."""
    try:
        metrics = ray.train.Result.from_path(settings.load().path("runs", name)).metrics
    except Exception:  # there is none, or the list of checkpoints is just being written
        return "no checkpoint"
    return f"checkpoint of epoch {metrics['epoch'] + 1}, step {metrics.get('step', 'last')}"


def kill(victim: str, name: str, driver: subprocess.Popen, rng: random.Random) -> bool:
    """Kill the victim, waiting for a worker if there is none yet; return whether the run was still going on."""
    while driver.poll() is None:
        if victim == "driver":
            driver.send_signal(signal.SIGKILL)
            return True
        # What `process_iter` has read: a process may end at any moment, and then could not be asked any more.
        workers = [one for one in processes_of(name) if "RayTrainWorker" in "".join(one.info["cmdline"][:1])]
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = rng.choice(workers) if workers else None
            if worker and (raylet := worker.parent()):
                worker.kill() if victim == "worker" else nodes.kill_node(raylet)
                return True
        time.sleep(0.1)
    return False


def output_of(driver: subprocess.Popen) -> list[str]:
    """Wait for the end of a driver and return the lines it printed; end it and show its errors if it hangs."""
    try:
        return driver.communicate(timeout=600)[0].splitlines()
    except BaseException:
        driver.kill()
        driver.errors.seek(0)
        print(driver.errors.read()[-4000:], flush=True)
        raise


def run(victim: str | None, moment: float, rng: random.Random) -> Outcome:
    """Train, kill the victim `moment` seconds after `fit()` was called, resume if need be, and check the end."""
    name, seed = unique_run_name(), rng.randrange(10_000)  # weights and order of the images differ from run to run
    driver, killed, stored = start(name, victim, seed), False, None
    if victim:
        time.sleep(moment)
        try:
            killed = kill(victim, name, driver, rng)
        except BaseException:
            driver.kill()  # or it would go on at the same time as what comes next
            raise
        stored = latest_checkpoint(name) if killed else "nothing was killed, the run was over"
    lines = output_of(driver)
    if killed and driver.returncode == (-signal.SIGKILL if victim == "driver" else NOT_RETRIED):
        stored += ", a new driver resumes"
        _, left = psutil.wait_procs(processes_of(name), timeout=60)
        assert not left, f"processes outlived their driver: {left}"
        driver = start(name, victim, seed)
        lines = output_of(driver)
    driver.errors.seek(0)
    assert driver.returncode == 0 and lines, f"the run ended with {driver.returncode}:\n{driver.errors.read()[-4000:]}"
    end = json.loads(lines[-1])
    assert end["epochs"] == list(range(NUM_EPOCHS)), f"not every epoch once: {end['epochs']}"
    assert all(end["complete"]), f"an image was lost or repeated: {end['complete']}"
    _, left = psutil.wait_procs(processes_of(name), timeout=60)
    assert not left, f"processes are left: {left}"
    return Outcome(end["loss"], end["seconds"], stored)


def main(count: int, first_seed: int) -> None:
    """Run undisturbed ten times for comparison, then `count` times with a kill; raise at the first wrong end."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would tell of every list of checkpoints that is read
    undisturbed = [run(None, 0, random.Random(first_seed - n)) for n in range(1, 11)]
    losses = [outcome.loss for outcome in undisturbed]
    seconds, after_kills = min(outcome.seconds for outcome in undisturbed), []
    print(f"undisturbed: losses {', '.join(f'{loss:.3f}' for loss in losses)}, {seconds:.0f} s", flush=True)
    for seed in range(first_seed, first_seed + count):
        rng = random.Random(seed)
        victim, moment = VICTIMS[seed % 3], rng.uniform(0, seconds)
        outcome = run(victim, moment, rng)
        what = f"seed {seed}: {victim}, {moment:.1f} s after fit() was called, {outcome.stored}"
        print(f"{what}; loss {outcome.loss:.3f}", flush=True)
        assert outcome.loss < 2 * max(losses), "far above the losses of undisturbed runs: was the checkpoint loaded?"
        after_kills.append(outcome.loss)
    print(f"{count} of {count} runs: each epoch once, each image once per epoch, no process left.")
    spread = " to ".join(f"{loss:.3f}" for loss in (min(after_kills), max(after_kills)))
    chance = mannwhitneyu(after_kills, losses, alternative="greater").pvalue
    print(f"Losses after a kill {spread}, undisturbed {min(losses):.3f} to {max(losses):.3f},", end=" ")
    print(f"at least as high by chance in {chance:.0%} of such experiments.")
    assert chance > 0.01, "the losses after a kill are higher than those of undisturbed runs"


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2], on_nodes=sys.argv[3] == "node")
    else:
        main(int((sys.argv[1:] or [20])[0]), int((sys.argv[2:] or [random.randrange(10_000)])[0]))
