"""Faults on purpose: a diary outside the training processes, a loop that is killed, a driver that dies."""

import itertools
import os
import signal
import sys
import threading
import time

import pyarrow.fs
import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from helpers import cluster, data, progress, settings
from helpers.sharding import KeepEveryRow
from helpers.trainer import build_run_config, build_train_loop_config
from helpers.training import train_loop_ray_train_ray_data


class Diary:
    """Notes every optimizer step, and decides which of them is a worker's last; to be a Ray actor of its own.

    Args:
        fatal_steps: steps after which the worker that took them is to die, each once.
    """

    def __init__(self, fatal_steps: list[int]):
        self.fatal_steps = list(fatal_steps)
        self.pages = []

    def note(self, process: int, node: str, step: int) -> bool:
        """Write a step down, counted from the start of training; return whether the worker must die now."""
        self.pages.append({"time": time.time(), "process": process, "node": node, "step": step})
        if step in self.fatal_steps:
            self.fatal_steps.remove(step)
            return True
        return False

    def read(self) -> list[dict]:
        """Return all pages: `time` in seconds, `process` id, `node` id, `step`."""
        return self.pages


def kill_worker() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)  # no clean-up, no last words: as when memory runs out


def with_faults(diary, fault=kill_worker):
    """Return the train loop of lesson 03, unchanged, with a witness: `fault` befalls rank 0 where `diary` says so."""

    def train_loop(config):
        taken = epochs_in_checkpoint() * config["steps_per_epoch"]
        steps = itertools.count(taken + 1)
        node = ray.get_runtime_context().get_node_id()

        def after_each_step(*_):
            if ray.get(diary.note.remote(os.getpid(), node, next(steps))):
                time.sleep(1)  # the controller looks for reports twice a second; let it see the last one
                fault()

        if ray.train.get_context().get_world_rank() == 0:
            register_optimizer_step_post_hook(after_each_step)
        return train_loop_ray_train_ray_data(config)

    return train_loop


def epochs_in_checkpoint() -> int:
    """How many epochs the checkpoint holds that Ray Train hands to this worker; 0 without one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return len(torch.load(os.path.join(folder, "state.pt"), weights_only=True)["history"])


def build_short_trainer(
    name: str,
    max_failures: int,
    train_loop=train_loop_ray_train_ray_data,
    scaling_config: ScalingConfig | None = None,
    num_epochs: int = 3,
) -> TorchTrainer:
    """Put together a run of a few short epochs, without augmentation, so that two runs can be compared digit by digit.

    Args:
        name: the run's folder. A name that was used before goes on where that run stopped.
        max_failures: how often Ray Train may start the workers again.
        train_loop: what runs on each worker.
        scaling_config: the workers; as many as suit what Ray has when not given.
        num_epochs: how many of these epochs of three batches.
    """
    chosen = settings.load()
    scaling_config = scaling_config or cluster.scaling_config(chosen)
    cluster.require(scaling_config)
    train_ds = data.load("train", chosen).limit(3 * chosen.batch_size).materialize()
    test_ds = data.load("test", chosen).limit(64).materialize()
    config = build_train_loop_config(train_ds, data.class_names(chosen), scaling_config.num_workers, chosen)
    return TorchTrainer(
        train_loop,
        train_loop_config={**config, "num_epochs": num_epochs},
        scaling_config=scaling_config,
        run_config=RunConfig(
            storage_path=chosen.path("runs"),
            name=name,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2,
                checkpoint_score_attribute="test_accuracy",
                checkpoint_score_order="max",
            ),
            callbacks=[progress.ReportWriter()],
        ),
        datasets={"train": train_ds, "test": test_ds},
        dataset_config=KeepEveryRow(),
    )


def new_name() -> str:
    """A run name that was never used before."""
    return build_run_config(settings.load()).name


def train_until_the_driver_dies(name: str) -> None:
    """Start a run, with the actor of that name as its diary, and kill this very process after the first checkpoint.

    Raises:
        ValueError: the Ray that `RAY_ADDRESS` names has no such actor in the namespace `faults`.
    """
    cluster.connect()
    diary = ray.get_actor(name, namespace="faults")
    trainer = build_short_trainer(name, max_failures=1, train_loop=with_faults(diary))
    threading.Thread(target=_die_after_the_first_checkpoint, args=(trainer.run_config,), daemon=True).start()
    trainer.fit()


def _die_after_the_first_checkpoint(run_config: RunConfig) -> None:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(f"{run_config.storage_path}/{run_config.name}")
    register = f"{path}/checkpoint_manager_snapshot.json"
    while True:
        if filesystem.get_file_info(register).type == pyarrow.fs.FileType.File:
            with filesystem.open_input_stream(register) as stream:
                if b"checkpoint_2" in stream.read():
                    os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    train_until_the_driver_dies(sys.argv[1])
