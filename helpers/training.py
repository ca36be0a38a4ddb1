"""The train loop that runs on every worker, evaluation, and what a checkpoint holds."""

import os
import tempfile

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from helpers.model import build_model
from helpers.preprocessing import normalize_images


def train_loop_ray_train_ray_data(config: dict) -> list[dict]:
    """Train on this worker's shards of `train` and `test`; runs once in every worker process.

    Args:
        config: `num_epochs`, `global_batch_size`, `learning_rate`, `seed`, `num_classes`, `steps_per_epoch`,
            and the channels' `mean` and `std`.

    Returns:
        The history: one dict of metrics an epoch, complete even when few checkpoints are kept.
    """
    context = ray.train.get_context()
    torch.manual_seed(config["seed"])
    device = ray.train.torch.get_device()

    model = ray.train.torch.prepare_model(build_model(config["num_classes"]))
    raw_model = getattr(model, "module", model)  # with one worker there is no DDP wrapper
    optimizer, scheduler = build_optimizer(raw_model, config)
    batch_size = config["global_batch_size"] // context.get_world_size()
    train_shard = ray.train.get_dataset_shard("train")
    test_shard = ray.train.get_dataset_shard("test")

    first_epoch, history = resume(raw_model, optimizer, scheduler)
    for epoch in range(first_epoch, config["num_epochs"]):
        model.train()
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, pictures
        for batch in train_shard.iter_torch_batches(
            batch_size=batch_size,
            drop_last=True,
            local_shuffle_buffer_size=max(2 * batch_size, 4096),
            local_shuffle_seed=config["seed"] + epoch,
        ):
            images, labels = batch["image"].to(device), batch["label"].to(device)
            logits = model(normalize_images(images, config["mean"], config["std"]))
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            totals += batch_totals(logits, labels, loss)
        train_loss, train_accuracy = mean_over_workers(totals, device)

        share_buffers(raw_model)
        totals = evaluate(raw_model, test_shard.iter_torch_batches(batch_size=256), config)
        test_loss, test_accuracy = mean_over_workers(totals, device)
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
        history.append(metrics)
        report_with_checkpoint(metrics, raw_model, optimizer, scheduler, history, config)
    return history


def build_optimizer(model: nn.Module, config: dict):
    """Return SGD with Nesterov momentum and its one-cycle schedule over the whole run.

    Source: Smith and Topin, "Super-Convergence", 2018 (arXiv:1708.07120).
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config["learning_rate"],
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-3,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config["learning_rate"],
        total_steps=config["num_epochs"] * config["steps_per_epoch"],
        pct_start=0.2,
    )
    return optimizer, scheduler


def batch_totals(logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Return float64 (3,) on the CPU: the batch's summed loss, its correct answers, its pictures."""
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.tensor([loss.item() * len(labels), correct.item(), len(labels)], dtype=torch.float64)


@torch.no_grad()
def evaluate(model: nn.Module, batches, config: dict) -> torch.Tensor:
    """Add up loss, correct answers and pictures over `batches`, without training.

    Args:
        model: the unwrapped network; a DDP wrapper would synchronise buffers at each call.
        batches: dicts of tensors `image`, uint8 (batch, height, width, 3), and `label`, int64 (batch,).
        config: holds the channels' `mean` and `std`.

    Returns:
        float64 (3,) as `batch_totals` gives it, for this worker's batches alone.
    """
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        images, labels = batch["image"].to(device), batch["label"].to(device)
        logits = model(normalize_images(images, config["mean"], config["std"]))
        totals += batch_totals(logits, labels, nn.functional.cross_entropy(logits, labels))
    return totals


def share_buffers(model: nn.Module) -> None:
    """Give every worker rank 0's batch-norm statistics: the network that is evaluated is the one that is saved.

    DDP copies rank 0's buffers to all workers before each training step. The step then updates them from each
    worker's own pictures: after an epoch's last step they are nearly equal, but not equal.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def mean_over_workers(totals: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Sum `totals` over all workers, then divide once: the loss and accuracy of the whole split."""
    totals = totals.to(device)
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, correct, pictures = totals.tolist()
    return loss / pictures, correct / pictures


def report_with_checkpoint(metrics, model, optimizer, scheduler, history, config):
    """Report an epoch; rank 0 attaches all that is needed to use the model or to go on training."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "random_state": torch.get_rng_state(),
                "history": history,
                "config": config,
            }
            torch.save(state, os.path.join(folder, "state.pt"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)


def resume(model, optimizer, scheduler) -> tuple[int, list[dict]]:
    """Load the checkpoint that Ray Train hands to a restarted worker; return the epoch to start at and the history."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, []
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random_state"])
    return len(state["history"]), state["history"]
