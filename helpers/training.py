"""The train loop that runs on every worker, evaluation, and what a checkpoint holds."""

import os
import random
import tempfile
import time

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from helpers.model import build_model
from helpers.preprocessing import normalize_images


def train_loop_ray_train_ray_data(config: dict) -> list[dict]:
    """Train on this worker's shards of `train` and `validation`; runs once in every worker process.

    `config` is what `build_train_loop_config` returns and, if wanted, `mixed_precision`: bfloat16 and the channels-last
    layout, by default on a GPU only. Returns one dict of metrics per epoch; its `seconds` are this worker's, by part.
    """
    context = ray.train.get_context()
    torch.manual_seed(config["seed"] + context.get_world_rank())
    device = ray.train.torch.get_device()
    mixed_precision = config.get("mixed_precision", device.type == "cuda")
    layout = torch.channels_last if mixed_precision else torch.contiguous_format

    model = build_model(config["num_classes"], config["image_size"]).to(memory_format=layout)
    model = ray.train.torch.prepare_model(model)
    raw_model = getattr(model, "module", model)  # with one worker there is no DDP wrapper
    optimizer, scheduler = build_optimizer(raw_model, config)
    batch_size = config["global_batch_size"] // context.get_world_size()
    # Less than two batches, and workers may take different numbers of steps (ray#66085).
    shuffle_buffer = max(2 * batch_size, min(4096, config["steps_per_epoch"] * batch_size // 4))
    train_shard = ray.train.get_dataset_shard("train")
    validation_shard = ray.train.get_dataset_shard("validation")

    first_epoch, history = resume(raw_model, optimizer, scheduler)
    for epoch in range(first_epoch, config["num_epochs"]):
        timer = Timer()
        model.train()
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct predictions, images
        for batch in train_shard.iter_torch_batches(
            batch_size=batch_size,
            drop_last=True,
            local_shuffle_buffer_size=shuffle_buffer,
            local_shuffle_seed=config["seed"] + epoch,
        ):
            timer.lap("data")
            images = normalize_images(batch["image"], config["mean"], config["std"]).to(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                logits = model(images)
                loss = nn.functional.cross_entropy(logits, batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            totals += batch_totals(logits, batch["label"], loss)
            timer.lap("steps")
        train_loss, train_accuracy = mean_over_workers(totals)
        timer.lap("steps")

        share_buffers(raw_model)
        totals = evaluate(raw_model, validation_shard.iter_torch_batches(batch_size=256), config)
        validation_loss, validation_accuracy = mean_over_workers(totals)
        timer.lap("validation")
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "seconds": dict(timer.seconds),
        }
        history.append(metrics)
        report_with_checkpoint(metrics, raw_model, optimizer, scheduler, history, config)
        timer.lap("report")
        history[-1] = {**metrics, "seconds": timer.seconds}  # the returned history has the time of the report, too
    return history


class Timer:
    """Splits the time since its creation into named parts: `seconds` by part."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


def build_optimizer(model: nn.Module, config: dict):
    """Return SGD with Nesterov momentum and its one-cycle schedule (Smith and Topin, 2018, arXiv:1708.07120)."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config["learning_rate"], momentum=0.9, nesterov=True, weight_decay=5e-3, fused=True
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config["learning_rate"],
        total_steps=config["num_epochs"] * config["steps_per_epoch"],
        pct_start=0.2,
    )
    return optimizer, scheduler


def batch_totals(logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Return float64 (3,), on the device of `logits`: a batch's summed loss, its correct predictions, its images."""
    correct = (logits.argmax(dim=1) == labels).sum().double()
    count = torch.full_like(correct, len(labels))
    return torch.stack([loss.detach().double() * count, correct, count])


@torch.no_grad()
def evaluate(model: nn.Module, batches, config: dict) -> torch.Tensor:
    """Sum `batch_totals`, float64 (3,), over `batches` of `image`, uint8 (batch, height, width, 3), and `label`."""
    # `model` comes without its DDP wrapper, whose first call would wait for a worker that has no batch.
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        logits = model(normalize_images(batch["image"], config["mean"], config["std"]))
        totals += batch_totals(logits, batch["label"], nn.functional.cross_entropy(logits, batch["label"]))
    return totals


def share_buffers(model: nn.Module) -> None:
    """Give every worker rank 0's batch-norm statistics, so that the network that is saved was evaluated."""
    # DDP copies rank 0's buffers before each step, which then updates them with each worker's own images.
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def mean_over_workers(totals: torch.Tensor) -> tuple[float, float]:
    """Sum `totals` over all workers, then divide once: loss and accuracy of the whole split."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, correct, count = totals.tolist()
    return loss / count, correct / count


def report_with_checkpoint(metrics, model, optimizer, scheduler, history, config):
    """Report an epoch; rank 0 attaches everything that is needed to use the model or to resume training."""
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"random_states": gather_over_workers(get_random_state()), "history": history, "config": config}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            torch.save(state, os.path.join(folder, "state.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)


def resume(model, optimizer, scheduler) -> tuple[int, list[dict]]:
    """Load the checkpoint that Ray Train gives to a restarted worker; return the first epoch and the history."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    rank = ray.train.get_context().get_world_rank()
    if rank < len(state["random_states"]):  # a worker that was not there before keeps its own seed
        set_random_state(state["random_states"][rank])
    return len(state["history"]), state["history"]


def gather_over_workers(value) -> list:
    """Return the `value` of every worker, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def get_random_state() -> dict:
    """Return the state of this worker's random generators: PyTorch's, the GPU's, NumPy's and Python's."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),  # a list, because `torch.load(weights_only=True)` refuses arrays
        "python": random.getstate(),
    }


def set_random_state(state: dict) -> None:
    """Restore what `get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
