"""Inside an epoch, after a failure and with another number of workers: every image once, no more and no less."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from helpers import data, data_config, faults, mid_epoch, settings
from helpers.preprocessing import image_ids
from helpers.trainer import build_train_loop_config

pytestmark = pytest.mark.usefixtures("shared_ray")


def test_merge_over_workers_sums_totals():
    merged = mid_epoch.merge_over_workers([7, 8], torch.tensor([1.5, 1.0, 2.0]))
    assert merged == {"seen": [7, 8], "totals": [1.5, 1.0, 2.0]}


@pytest.fixture(scope="module")
def images():
    cfg = settings.load()
    batch = data.load("train", cfg).take_batch(96)
    ids, different = np.unique(image_ids(batch["image"]), return_index=True)
    table = data.to_table(batch["image"][different], batch["label"][different], data.class_names(cfg))
    return table.append_column("id", pa.array(ids)).slice(0, len(ids) // 16 * 16)


def build_trainer(table, name, workers, train_loop, rest=data_config.rest_of_epoch):
    cfg = settings.load()
    train_ds = ray.data.from_arrow([table.slice(start, 8) for start in range(0, len(table), 8)])
    config = build_train_loop_config(train_ds, data.class_names(cfg), workers, cfg)
    steps = {"global_batch_size": 16, "steps_per_epoch": len(table) // 16, "steps_per_checkpoint": 2, "num_epochs": 2}
    return TorchTrainer(
        train_loop,
        train_loop_config={**config, **steps},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=cfg.path("runs"), name=name, failure_config=FailureConfig(max_failures=1)),
        datasets={"train": train_ds, "rest": rest(train_ds, cfg.path("runs", name))},
    )


@pytest.mark.parametrize("workers", [(1, 2), (2, 1)])
def test_fit_killed_inside_an_epoch_sees_every_image_once(images, workers):
    """The first call of fit() has one failure too many in the second epoch; the second resumes with other workers."""
    steps = len(images) // 16
    kills = [steps + 3, steps + 4]  # after the checkpoint of the second step, in two attempts
    step_log = ray.remote(faults.StepLog).options(num_cpus=0).remote(kills)
    train_loop = faults.inject_faults(step_log, train_loop=mid_epoch.train_loop_mid_epoch)
    name = faults.unique_run_name()
    with pytest.raises(ray.train.TrainingFailedError):
        build_trainer(images, name, workers[0], train_loop).fit()
    history = build_trainer(images, name, workers[1], train_loop).fit().return_value
    taken = [entry["step"] for entry in ray.get(step_log.entries.remote())]
    ray.kill(step_log)
    expected = Counter(images["id"].to_pylist())
    assert [metrics["epoch"] for metrics in history] == [0, 1]
    assert all(Counter(metrics["seen"]) == expected for metrics in history)
    assert taken == [*range(1, kills[0] + 1), *range(steps + 3, kills[1] + 1), *range(steps + 3, 2 * steps + 1)]


def test_fit_without_the_filter_repeats_images(images):
    """The proof is one: a run that starts its epoch again is found out."""
    step_log = ray.remote(faults.StepLog).options(num_cpus=0).remote([3])
    train_loop = faults.inject_faults(step_log, train_loop=mid_epoch.train_loop_mid_epoch)
    trainer = build_trainer(images, faults.unique_run_name(), 1, train_loop, rest=lambda train_ds, _: train_ds)
    trainer.train_loop_config.update(num_epochs=1)
    with pytest.raises(ray.train.TrainingFailedError):  # the schedule ends before the repeated images do
        trainer.fit()
    ray.kill(step_log)
