"""A simulated accelerator: a step that waits for a set time instead of computing, so that two cores can show scaling.

What remains is what Ray does: images read, augmented and handed to the workers, and gradients averaged over them.
"""

import time

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

from helpers import cluster, data, trainer
from helpers.data_config import KeepEvaluationRows
from helpers.preprocessing import normalize_images
from ray_pipeline import settings_for

BATCH, STEP_SECONDS, STEPS = 64, 0.2, 25


def loop(config: dict) -> list[float]:
    """Take the steps of three epochs; return how long each epoch took, the wait for its first batch included."""
    torch.set_num_threads(1)
    model = prepare_model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32**2, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shard, seconds = ray.train.get_dataset_shard("train"), []
    for _ in range(3):
        start, steps = time.perf_counter(), 0
        for batch in shard.iter_torch_batches(batch_size=BATCH, drop_last=True, local_shuffle_buffer_size=2 * BATCH):
            images = normalize_images(batch["image"], [0.5] * 3, [0.25] * 3)
            nn.functional.cross_entropy(model(images), batch["label"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(STEP_SECONDS)
            steps += 1
        seconds.append(time.perf_counter() - start)
        assert steps == STEPS
    return seconds


def scale(workers: int) -> dict:
    """Train with so many workers; return the efficiency of the epochs after the first: time of the steps ÷ of all."""
    ray.init(num_cpus=workers + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    cluster.connect()  # applies the settings of the series
    cfg = settings_for(workers * BATCH * STEPS, workers=workers)
    train_ds = data.load("train", cfg)
    run = TorchTrainer(
        loop,
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=cfg.path("runs")),
        datasets={"train": trainer.build_datasets(train_ds, train_ds, flip=True)["train"]},
        dataset_config=KeepEvaluationRows(),
    )
    later = run.fit().return_value[1:]
    return {"efficiency": len(later) * STEPS * STEP_SECONDS / sum(later)}
