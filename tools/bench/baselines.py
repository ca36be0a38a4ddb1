"""The usual ways to train: a bare loop, a DataLoader, torchrun with DDP, and the per-row Ray recipe.

Network, optimizer, batch size and number of steps are those of `helpers`, so that only the data's way to them differs.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

import memory
from helpers.model import build_model
from helpers.preprocessing import normalize_images
from helpers.training import build_optimizer
from images import noise

MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
HELD_OUT = 500  # images in each split but train


class Steps:
    """A network with its optimizer, for steps that cost what the lessons' steps cost."""

    def __init__(self, images: int, epochs: int, batch: int, distributed: bool = False):
        self.model = build_model(10).train()
        config = {"learning_rate": 0.01, "num_epochs": epochs, "steps_per_epoch": images // batch + 1}
        self.optimizer, self.scheduler = build_optimizer(self.model, config)
        if distributed:
            self.model = nn.parallel.DistributedDataParallel(self.model)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Take one step: forward, backward, update."""
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        loss.item()

    def validate(self, batches: Iterable) -> None:
        """Count the correct predictions, each process for its images."""
        self.model.eval()
        totals = torch.zeros(2)
        with torch.no_grad():
            for inputs, labels in batches:
                correct = (self.model(inputs).argmax(dim=1) == labels).sum()
                totals += torch.stack([correct, torch.tensor(len(labels))])
        if dist.is_initialized():
            dist.all_reduce(totals)
        self.model.train()

    def save(self, folder: str) -> bool:
        """Write a checkpoint on rank 0, and return whether this is rank 0."""
        if dist.is_initialized() and dist.get_rank() > 0:
            return False
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, f"{folder}/state.pt")
        return True

    def finish_epoch(self, loader: DataLoader) -> None:
        """Validate, then write a checkpoint, as `fit()` does."""
        self.validate(loader)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)


def bare(images: int, epochs: int, batch: int) -> Iterator[float]:
    """Take the steps alone, over normalised tensors in memory: nothing can be faster.

    In one of several processes that train together: a share of the images and of each batch.

    Yields:
        The `time.time()` at which each step ended; first that of an extra one, which sets things up.
    """
    together = dist.is_initialized() and dist.get_world_size() > 1
    if together:
        images, batch = images // dist.get_world_size(), batch // dist.get_world_size()
    pixels, labels = noise(images)
    inputs, labels = normalize_images(torch.from_numpy(pixels), MEAN, STD), torch.from_numpy(labels)
    step = Steps(images, epochs, batch, distributed=together)
    step(inputs[:batch], labels[:batch])
    yield time.time()
    for _ in range(epochs):
        order = torch.randperm(images)
        for first in range(0, images - batch + 1, batch):
            indices = order[first : first + batch]
            step(inputs[indices], labels[indices])
            yield time.time()


def bare_until_terminated(images: int, batch: int) -> dict:
    """Take bare steps until the bench terminates this program, or ends itself."""
    steps, terminated, bench = [], [], os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    for moment in bare(images, epochs=1000, batch=batch):
        steps.append(moment)
        if terminated or os.getppid() != bench:
            break
    return {"steps": steps}


class Images(Dataset):
    """Images in memory, shifted, scaled and normalised one by one, as every DataLoader tutorial does it."""

    def __init__(self, count: int):
        self.pixels, self.labels = noise(count)
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


def _validation_loader(sampler=None) -> DataLoader:
    dataset = Images(HELD_OUT)
    return DataLoader(dataset, batch_size=256, sampler=sampler(dataset, shuffle=False) if sampler else None)


def _loader(images: int, batch: int, sampler=None) -> DataLoader:
    dataset = Images(images)
    return DataLoader(
        dataset,
        batch_size=batch,
        shuffle=sampler is None,
        sampler=sampler(dataset) if sampler else None,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
    )


def dataloader(images: int, epochs: int, batch: int) -> dict:
    """Train from a DataLoader with two worker processes; validate and save after each epoch."""
    loader, validation_loader = _loader(images, batch), _validation_loader()
    step, spans = Steps(images, epochs, batch), []
    for _ in range(epochs):
        start = time.time()
        for inputs, labels in loader:
            step(inputs, labels)
        spans.append([start, time.time()])
        step.finish_epoch(validation_loader)
    return {"spans": spans}


def ddp(images: int, epochs: int, batch: int) -> dict:
    """Train in one of torchrun's processes: a share of each batch, gradients averaged over all processes."""
    dist.init_process_group("gloo")
    share, spans = batch // dist.get_world_size(), []
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    loader = _loader(images, share, sampler=DistributedSampler)
    validation_loader = _validation_loader(sampler=DistributedSampler)
    step = Steps(images, epochs, batch, distributed=True)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        start = time.time()
        for inputs, labels in loader:
            step(inputs, labels)
        spans.append([start, time.time()])
        step.finish_epoch(validation_loader)
    rank = dist.get_rank()
    dist.destroy_process_group()
    return {"spans": spans, "rank": rank}


def dataloader_ingest(images: int, epochs: int, batch: int) -> dict:
    """Take batches from a DataLoader with two worker processes and do nothing with them."""
    loader, seconds = _loader(images, batch), []
    for _ in range(epochs):
        start = time.perf_counter()
        taken = sum(len(labels) for _, labels in loader)
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds, "images": taken}


def per_row_write(images: int, folder: str) -> dict:
    """Write Parquet the way it is often shown: nested Python lists in a pandas column."""
    import pandas as pd

    pixels, labels = noise(images)
    before = memory.resident()
    start = time.perf_counter()
    pd.DataFrame({"image": pixels.tolist(), "label": labels}).to_parquet(os.path.join(folder, "images.parquet"))
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

    step = Steps(config["images"], config["epochs"], config["batch"])
    step.model = ray.train.torch.prepare_model(step.model)
    shard, spans = ray.train.get_dataset_shard("train"), []
    for epoch in range(config["epochs"]):
        start = time.time()
        for batch in shard.iter_torch_batches(batch_size=config["batch"], drop_last=True):
            step(batch["image"], batch["label"])
        spans.append([start, time.time()])
        ray.train.report({"epoch": epoch})
    return spans


def per_row_fit(images: int, epochs: int, batch: int, folder: str) -> dict:
    """Run the whole per-row recipe with all of Ray's defaults."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    per_row_write(images, folder)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=4)
    start = time.time()
    result = TorchTrainer(
        per_row_loop,
        train_loop_config={"images": images, "epochs": epochs, "batch": batch},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=folder, name="per-row"),
        datasets={"train": per_row_dataset(os.path.join(folder, "images.parquet"))},
    ).fit()
    return {"moments": {"fit": start, "end": time.time()}, "spans": result.return_value}


def per_row_ingest(images: int, epochs: int, batch: int, folder: str) -> dict:
    """Take batches from the per-row recipe's dataset and do nothing with them."""
    import ray

    per_row_write(images, folder)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=4)
    dataset, seconds = per_row_dataset(os.path.join(folder, "images.parquet")), []
    for _ in range(epochs):
        start = time.perf_counter()
        taken = sum(len(part["label"]) for part in dataset.iter_torch_batches(batch_size=batch, drop_last=True))
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds, "images": taken}


def pil_loop(folder: str) -> dict:
    """Open and decode every image of a folder in a plain loop: the least that reading it takes."""
    from pathlib import Path

    from PIL import Image

    start = time.perf_counter()
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).rglob("*.jpg"))]
    return {"seconds": time.perf_counter() - start, "images": len(images)}
