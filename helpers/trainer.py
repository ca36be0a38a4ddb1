"""The parts of the TorchTrainer, each in a function of its own, and the trainer put together."""

import uuid
from datetime import datetime

import ray.data
from ray.data.dataset import MaterializedDataset
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from helpers import cluster, data, progress, settings
from helpers.data_config import KeepEvaluationRows
from helpers.preprocessing import augment_batch, channel_statistics
from helpers.training import train_loop_ray_train_ray_data


def build_datasets(train_ds: ray.data.Dataset, validation_ds: ray.data.Dataset, flip: bool) -> dict:
    """Return `train`, in a new order and with new variants of its images in each epoch, and `validation` as it is."""
    if isinstance(train_ds, MaterializedDataset):  # streamed, this would wait until the last file is read
        train_ds = train_ds.randomize_block_order()
    augmented = train_ds.map_batches(augment_batch, fn_kwargs={"flip": flip}, batch_size=None)
    return {"train": augmented, "validation": validation_ds}


def check_batch_size(cfg: settings.Settings, num_workers: int, num_images: int) -> int:
    """Return the global batch size: the learner's, or one of three steps per epoch; ValueError if it can't be used."""
    # Small data: a third of the images, so that an epoch has three steps. Batch norm needs two images per worker.
    per_worker = max(2, min(cfg.batch_size, num_images // 3) // num_workers)
    batch_size = cfg.batch_size
    if batch_size == settings.Settings.batch_size and not settings.is_chosen("batch_size"):
        batch_size = per_worker * num_workers
        if batch_size != cfg.batch_size:
            print(f"Batch size {batch_size} instead of {cfg.batch_size}: workers {num_workers}, images {num_images:,}.")
    if batch_size % num_workers or batch_size < 2 * num_workers:
        what = f"A global batch of {batch_size} images can't be shared evenly by {num_workers} workers, 2 or more each"
        raise ValueError(f"{what}: set TUTORIAL_BATCH_SIZE to {per_worker * num_workers}.")
    if batch_size // num_workers > num_images // num_workers:
        what = f"{num_images} training images do not fill one batch of {batch_size}"
        raise ValueError(f"{what}: set TUTORIAL_BATCH_SIZE or TUTORIAL_WORKERS to a smaller number.")
    return batch_size


def build_train_loop_config(
    train_ds: ray.data.Dataset, class_names: list[str], num_workers: int, cfg: settings.Settings, statistics=None
) -> dict:
    """Return what every worker needs: hyperparameters, and what was measured on `train_ds`, now or in `statistics`."""
    num_images = train_ds.count()
    batch_size = check_batch_size(cfg, num_workers, num_images)
    mean, std = statistics or channel_statistics(train_ds)
    chosen = {"num_epochs": cfg.epochs, "learning_rate": cfg.learning_rate, "seed": cfg.seed}
    return {
        **chosen,
        "global_batch_size": batch_size,
        "steps_per_epoch": num_images // num_workers // (batch_size // num_workers),
        "num_classes": len(class_names),
        "class_names": class_names,
        "image_size": cfg.image_size,
        "mean": mean,
        "std": std,
    }


def build_run_config(cfg: settings.Settings) -> RunConfig:
    """Return where the run is kept, under a unique name: a name used twice would resume the earlier run."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return RunConfig(
        storage_path=cfg.path("runs"),
        name=f"dist-{cfg.data_name}-res18-ray-data-{stamp}",
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        callbacks=[progress.ReportWriter()],
    )


def build_trainer(cfg: settings.Settings | None = None, scaling_config: ScalingConfig | None = None) -> TorchTrainer:
    """Put the trainer together, as lesson 04 does part by part; or raise ClusterError, DataError or ValueError."""
    cfg = cfg or settings.load()
    scaling_config = scaling_config or cluster.scaling_config(cfg)
    cluster.require_resources(scaling_config)
    cluster.require_shared_storage(cfg.storage)
    train_ds, validation_ds = data.load("train", cfg), data.load("validation", cfg)
    return TorchTrainer(
        train_loop_ray_train_ray_data,
        train_loop_config=build_train_loop_config(train_ds, data.class_names(cfg), scaling_config.num_workers, cfg),
        scaling_config=scaling_config,
        run_config=build_run_config(cfg),
        datasets=build_datasets(train_ds, validation_ds, flip=cfg.flips),
        dataset_config=KeepEvaluationRows(),
    )
