"""Which images each worker reads; Ray Train's own processes and data tasks import this, sooner without PyTorch."""

import os
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
from ray.train import DataConfig


class KeepEvaluationRows(DataConfig):
    """Splits `train` evenly, and every other dataset without dropping a row."""

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        """Return one dict of shards per worker; `equal=True` would drop up to `world_size - 1` validation images."""
        if world_size == 1:  # nothing to split, so no processes that would do it
            return DataConfig(datasets_to_split=[]).configure(datasets, 1, worker_handles, worker_node_ids, **kwargs)
        even = {name: dataset for name, dataset in datasets.items() if name == "train"}
        shards = super().configure(even, world_size, worker_handles, worker_node_ids, **kwargs)
        for name in datasets.keys() - even.keys():
            splits = datasets[name].streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for rank, split in enumerate(splits):
                shards[rank][name] = split
        return shards


def ids_seen(checkpoint: ray.train.Checkpoint) -> list[int]:
    """Return the ids of the images that the unfinished epoch in `checkpoint` has seen; none if it is finished."""
    import torch  # here: without a checkpoint, no process needs it

    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    last = state["history"][-1]
    return last["seen"] if "totals" in last else []


def remove_seen(table: pa.Table, seen: list[int]) -> pa.Table:
    """Return the rows of `table` whose `id` is not in `seen`."""
    return table.filter(~np.isin(table["id"].to_numpy(), seen))


def rest_of_epoch(train_ds: ray.data.Dataset, run_folder: str) -> Callable[[], ray.data.Dataset]:
    """Return a function that Ray Train calls when it starts workers: what the latest checkpoint has not seen."""

    def rest():
        try:
            checkpoint = ray.train.Result.from_path(run_folder).checkpoint
        except RuntimeError:  # there is no checkpoint yet
            return train_ds
        return train_ds.map_batches(remove_seen, fn_kwargs={"seen": ids_seen(checkpoint)}, batch_format="pyarrow")

    return rest
