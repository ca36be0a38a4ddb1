"""How Ray Train splits datasets among workers; a process of Ray Train's imports this, sooner without PyTorch."""

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
