"""What a reader would use instead: a bare loop, a DataLoader, torchrun with DDP, and the per-row Ray recipe.

Each network, optimizer, batch size and number of steps is that of `helpers`, so that only the way there differs.
"""

import os
import signal
import time
from collections.abc import Iterator

import memory
import numpy as np
import torch
import torch.distributed as dist
from pictures import noise
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from helpers.model import build_model
from helpers.preprocessing import normalize_images
from helpers.training import build_optimizer

MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


class Steps:
    """A network with its optimizer, for steps that cost what the lessons' steps cost."""

    def __init__(self, rows: int, epochs: int, batch: int, distributed: bool = False):
        self.model = build_model(10).train()
        config = {"learning_rate": 0.01, "num_epochs": epochs, "steps_per_epoch": rows // batch + 1}
        self.optimizer, self.scheduler = build_optimizer(self.model, config)
        if distributed:
            self.model = nn.parallel.DistributedDataParallel(self.model)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        loss.item()


def bare(rows: int, epochs: int, batch: int) -> Iterator[float]:
    """Take the steps alone, over tensors that lie in memory already normalised: the limit.

    In one of several processes that train together, a share of the rows and of each batch.

    Yields:
        The `time.time()` at which each step ended; first that of one more, which sets things up.
    """
    together = dist.is_initialized() and dist.get_world_size() > 1
    if together:
        rows, batch = rows // dist.get_world_size(), batch // dist.get_world_size()
    pixels, labels = noise(rows)
    images, labels = normalize_images(torch.from_numpy(pixels), MEAN, STD), torch.from_numpy(labels)
    step = Steps(rows, epochs, batch, distributed=together)
    step(images[:batch], labels[:batch])
    yield time.time()
    for _ in range(epochs):
        order = torch.randperm(rows)
        for first in range(0, rows - batch + 1, batch):
            chosen = order[first : first + batch]
            step(images[chosen], labels[chosen])
            yield time.time()


def bare_until_terminated(rows: int, batch: int) -> dict:
    """Take bare steps for as long as the program lasts that this one runs in turns with, or the bench itself."""
    steps, terminated, bench = [], [], os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    for moment in bare(rows, epochs=1000, batch=batch):
        steps.append(moment)
        if terminated or os.getppid() != bench:
            break
    return {"steps": steps}


class Pictures(Dataset):
    """Pictures in memory, shifted, scaled and normalised one by one, as every DataLoader tutorial does it."""

    def __init__(self, rows: int):
        self.pixels, self.labels = noise(rows)
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=2),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.pixels[index]), int(self.labels[index])


def _loader(rows: int, batch: int, sampler=None) -> DataLoader:
    pictures = Pictures(rows)
    return DataLoader(
        pictures,
        batch_size=batch,
        shuffle=sampler is None,
        sampler=sampler(pictures) if sampler else None,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
    )


def dataloader(rows: int, epochs: int, batch: int) -> dict:
    """Train from a DataLoader with two worker processes."""
    loader, step, spans = _loader(rows, batch), Steps(rows, epochs, batch), []
    for _ in range(epochs):
        start = time.time()
        for images, labels in loader:
            step(images, labels)
        spans.append([start, time.time()])
    return {"spans": spans}


def ddp(rows: int, epochs: int, batch: int) -> dict:
    """Train in one of torchrun's processes: a share of each batch, gradients averaged over all processes."""
    dist.init_process_group("gloo")
    share, spans = batch // dist.get_world_size(), []
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    loader = _loader(rows, share, sampler=DistributedSampler)
    step = Steps(rows, epochs, batch, distributed=True)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        start = time.time()
        for images, labels in loader:
            step(images, labels)
        spans.append([start, time.time()])
    rank = dist.get_rank()
    dist.destroy_process_group()
    return {"spans": spans, "rank": rank}


def dataloader_ingest(rows: int, epochs: int, batch: int) -> dict:
    """Take batches from a DataLoader with two worker processes and do nothing with them."""
    loader, seconds = _loader(rows, batch), []
    for _ in range(epochs):
        start = time.perf_counter()
        taken = sum(len(labels) for _, labels in loader)
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds, "rows": taken}


def per_row_write(rows: int, folder: str) -> dict:
    """Write Parquet the way it is often shown: nested Python lists in a pandas column."""
    import pandas as pd

    pixels, labels = noise(rows)
    before = memory.resident()
    start = time.perf_counter()
    pd.DataFrame({"image": pixels.tolist(), "label": labels}).to_parquet(os.path.join(folder, "pictures.parquet"))
    return {"seconds": time.perf_counter() - start, "megabytes": memory.peak() - before}


def per_row_dataset(path: str):
    """Return the Ray Dataset of the per-row recipe: PIL and a new `Compose` for each row, float32 rows."""
    import ray.data

    def transform(row: dict) -> dict:
        compose = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=2),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        pixels = np.stack([np.stack(line) for line in row["image"]]).astype(np.uint8)
        return {"image": compose(pixels).numpy(), "label": row["label"]}

    return ray.data.read_parquet(path).map(transform)


def per_row_loop(config: dict) -> list[list[float]]:
    """Train on rows that are ready; the loop of the per-row recipe."""
    import ray.train.torch

    step = Steps(config["rows"], config["epochs"], config["batch"])
    step.model = ray.train.torch.prepare_model(step.model)
    shard, spans = ray.train.get_dataset_shard("train"), []
    for epoch in range(config["epochs"]):
        start = time.time()
        for batch in shard.iter_torch_batches(batch_size=config["batch"], drop_last=True):
            step(batch["image"], batch["label"])
        spans.append([start, time.time()])
        ray.train.report({"epoch": epoch})
    return spans


def per_row_fit(rows: int, epochs: int, batch: int, folder: str) -> dict:
    """Run the whole per-row recipe with every default of Ray's."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    per_row_write(rows, folder)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=4)
    start = time.time()
    result = TorchTrainer(
        per_row_loop,
        train_loop_config={"rows": rows, "epochs": epochs, "batch": batch},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=folder, name="per-row"),
        datasets={"train": per_row_dataset(os.path.join(folder, "pictures.parquet"))},
    ).fit()
    return {"moments": {"fit": start, "end": time.time()}, "spans": result.return_value}


def per_row_ingest(rows: int, epochs: int, batch: int, folder: str) -> dict:
    """Take batches from the per-row recipe's dataset and do nothing with them."""
    import ray

    per_row_write(rows, folder)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=4)
    dataset, seconds = per_row_dataset(os.path.join(folder, "pictures.parquet")), []
    for _ in range(epochs):
        start = time.perf_counter()
        taken = sum(len(part["label"]) for part in dataset.iter_torch_batches(batch_size=batch, drop_last=True))
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds, "rows": taken}


def pil_loop(folder: str) -> dict:
    """Open and decode every picture of a folder in a plain loop: what reading it can't do without."""
    from pathlib import Path

    from PIL import Image

    start = time.perf_counter()
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).rglob("*.jpg"))]
    return {"seconds": time.perf_counter() - start, "rows": len(pictures)}
