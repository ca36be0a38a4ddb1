"""Faults on purpose: a step log outside the training processes, and workers that are killed."""

import itertools
import os
import signal
import time
from dataclasses import replace

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, CheckpointConsistencyMode, FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from helpers import cluster, data, progress, settings
from helpers.data_config import KeepEvaluationRows
from helpers.trainer import build_run_config, build_train_loop_config
from helpers.training import train_loop_ray_train_ray_data


class StepLog:
    """A Ray actor's class: records every optimizer step; after each of `kill_after_steps` a worker is killed, once."""

    def __init__(self, kill_after_steps: list[int]):
        self.kill_after_steps = list(kill_after_steps)
        self.recorded = []

    def record(self, process: int, node: str, step: int, workers: int = 1) -> bool:
        """Record a step, counted from the start of training; return whether the worker must be killed now."""
        self.recorded.append({"time": time.time(), "process": process, "node": node, "step": step, "workers": workers})
        if step in self.kill_after_steps:
            self.kill_after_steps.remove(step)
            return True
        return False

    def entries(self) -> list[dict]:
        """Return one dict per step: `time` in seconds, `process` id, `node` id, `step`, number of `workers`."""
        return self.recorded


def kill_worker() -> None:
    """Kill this process at once, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)  # no clean-up, no exception


def inject_faults(step_log, fault=kill_worker, train_loop=train_loop_ray_train_ray_data):
    """Return `train_loop`, unchanged, with a hook on rank 0: it records each step and calls `fault`."""

    def train_loop_with_faults(config):
        steps = itertools.count(steps_in_checkpoint() + 1)
        node = ray.get_runtime_context().get_node_id()
        context = ray.train.get_context()

        def after_each_step(*_):
            if ray.get(step_log.record.remote(os.getpid(), node, next(steps), context.get_world_size())):
                # Wait until the controller has registered the last report: it looks for reports every now and then.
                ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
                fault()

        if context.get_world_rank() == 0:
            register_optimizer_step_post_hook(after_each_step)
        return train_loop(config)

    return train_loop_with_faults


def steps_in_checkpoint() -> int:
    """Return how many steps are in the checkpoint that Ray Train gives to this worker; 0 without one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        return state["scheduler"]["last_epoch"]


def build_short_run_config(name: str, max_failures: int) -> RunConfig:
    """Return where a short run is kept, and how it survives failures: see `build_short_trainer`."""
    return RunConfig(
        storage_path=settings.load().path("runs"),
        name=name,
        failure_config=FailureConfig(max_failures=max_failures),
        checkpoint_config=CheckpointConfig(
            num_to_keep=2, checkpoint_score_attribute="validation_accuracy", checkpoint_score_order="max"
        ),
        callbacks=[progress.ReportWriter()],
    )


def build_short_trainer(
    name: str, max_failures: int, train_loop=train_loop_ray_train_ray_data, scaling_config=None, num_epochs: int = 3
) -> TorchTrainer:
    """Build a run of short epochs without augmentation, or resume the run `name`; two runs agree digit by digit."""
    cfg = settings.load()
    scaling_config = scaling_config or cluster.scaling_config(replace(cfg, workers=1))  # more share images differently
    cluster.require_resources(scaling_config)
    train_ds = data.load("train", cfg).limit(3 * cfg.batch_size).materialize()
    validation_ds = data.load("validation", cfg).limit(64).materialize()
    config = build_train_loop_config(train_ds, data.class_names(cfg), scaling_config.num_workers, cfg)
    return TorchTrainer(
        train_loop,
        train_loop_config={**config, "num_epochs": num_epochs},
        scaling_config=scaling_config,
        run_config=build_short_run_config(name, max_failures),
        datasets={"train": train_ds, "validation": validation_ds},
        dataset_config=KeepEvaluationRows(),
    )


def unique_run_name() -> str:
    """Return a run name that was never used before."""
    return build_run_config(settings.load()).name
