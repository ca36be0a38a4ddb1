"""The parts of the TorchTrainer, each in a function of its own, and the trainer put together."""

import functools
import uuid
from datetime import datetime

import ray.data
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from helpers import cluster, data, progress, settings
from helpers.preprocessing import augment_batch, channel_statistics
from helpers.sharding import KeepEveryRow
from helpers.training import train_loop_ray_train_ray_data


def build_datasets(train_ds: ray.data.Dataset, test_ds: ray.data.Dataset, flip: bool) -> dict:
    """Return `train`, its blocks in a new order and its pictures varied anew each epoch, and `test` as it is."""
    varied = train_ds.randomize_block_order().map_batches(functools.partial(augment_batch, flip=flip), batch_size=None)
    return {"train": varied, "test": test_ds}


def build_train_loop_config(
    train_ds: ray.data.Dataset,
    class_names: list[str],
    num_workers: int,
    chosen: settings.Settings,
    statistics: tuple[list[float], list[float]] | None = None,
) -> dict:
    """Return what every worker needs to know: the hyperparameters and what was measured on the training split.

    Args:
        train_ds: the pictures to train on.
        class_names: one name for each label.
        num_workers: how many share each batch.
        chosen: the hyperparameters.
        statistics: what `channel_statistics` measured on `train_ds`; measured now when not given.

    Raises:
        ValueError: the global batch size does not suit the workers or the pictures.
    """
    per_worker_batch, rest = divmod(chosen.batch_size, num_workers)
    if rest:
        raise ValueError(
            f"A global batch of {chosen.batch_size} pictures can't be shared evenly by {num_workers} workers: "
            f"set TUTORIAL_BATCH_SIZE to {max(1, per_worker_batch) * num_workers}."
        )
    steps_per_epoch = train_ds.count() // num_workers // per_worker_batch
    if steps_per_epoch == 0:
        raise ValueError(
            f"{train_ds.count()} training pictures do not fill one batch of {chosen.batch_size}: "
            "set TUTORIAL_BATCH_SIZE to a smaller number."
        )
    mean, std = statistics or channel_statistics(train_ds)
    return {
        "num_epochs": chosen.epochs,
        "global_batch_size": chosen.batch_size,
        "learning_rate": chosen.learning_rate,
        "seed": chosen.seed,
        "num_classes": len(class_names),
        "class_names": class_names,
        "steps_per_epoch": steps_per_epoch,
        "mean": mean,
        "std": std,
    }


def build_run_config(chosen: settings.Settings) -> RunConfig:
    """Return where the run is kept, under a name of its own: a name used twice would resume the earlier run."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return RunConfig(
        storage_path=chosen.path("runs"),
        name=f"dist-{chosen.data_name}-res18-ray-data-{stamp}",
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        callbacks=[progress.ReportWriter()],
    )


def build_trainer(chosen: settings.Settings | None = None, scaling_config: ScalingConfig | None = None) -> TorchTrainer:
    """Put the trainer together for the chosen data, as lesson 04 does part by part.

    Raises:
        ClusterError: Ray can't give the workers that are asked for.
        DataError: the data source can't be used.
        ValueError: the batch size does not suit the workers or the pictures.
    """
    chosen = chosen or settings.load()
    scaling_config = scaling_config or cluster.scaling_config(chosen)
    cluster.require(scaling_config)
    cluster.require_shared(chosen.storage)
    train_ds, test_ds = data.load("train", chosen), data.load("test", chosen)
    return TorchTrainer(
        train_loop_ray_train_ray_data,
        train_loop_config=build_train_loop_config(
            train_ds, data.class_names(chosen), scaling_config.num_workers, chosen
        ),
        scaling_config=scaling_config,
        run_config=build_run_config(chosen),
        datasets=build_datasets(train_ds, test_ds, flip=chosen.flips),
        dataset_config=KeepEveryRow(),
    )
