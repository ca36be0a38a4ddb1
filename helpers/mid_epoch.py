"""Checkpoints inside an epoch: each image is seen once per epoch, whatever fails and however many workers resume."""

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import nn

from helpers.model import build_model
from helpers.preprocessing import normalize_images
from helpers.training import Timer, batch_totals, build_optimizer, gather_over_workers, report_with_checkpoint, resume


def merge_over_workers(seen: list[int], totals: torch.Tensor) -> dict:
    """Return `seen`, the image ids of all workers, and `totals`, their sums: loss, correct predictions, images."""
    ids, sums = zip(*gather_over_workers((seen, totals.tolist())), strict=True)
    return {"seen": [one for part in ids for one in part], "totals": np.sum(sums, axis=0).tolist()}


def train_metrics(merged: dict) -> dict:
    """Return loss and accuracy of the images in what `merge_over_workers` returned."""
    loss, correct, count = merged["totals"]
    return {"train_loss": loss / count, "train_accuracy": correct / count}


def train_step(model, optimizer, scheduler, batch: dict, config: dict) -> torch.Tensor:
    """Take one step with a batch, as lesson 03's loop does; return its `batch_totals`."""
    logits = model(normalize_images(batch["image"], config["mean"], config["std"]))
    loss = nn.functional.cross_entropy(logits, batch["label"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return batch_totals(logits, batch["label"], loss)


def train_loop_mid_epoch(config: dict) -> list[dict]:
    """Train like lesson 03's loop, and save every `steps_per_checkpoint` steps and when a node's end is announced.

    The datasets `train` and `rest` have a column `id`. Returns a dict of metrics per epoch, with the ids it has `seen`.
    """
    context = ray.train.get_context()
    torch.manual_seed(config["seed"] + context.get_world_rank())
    device = ray.train.torch.get_device()
    model = ray.train.torch.prepare_model(build_model(config["num_classes"], config["image_size"]))
    raw_model = getattr(model, "module", model)
    optimizer, scheduler = build_optimizer(raw_model, config)
    batch_size = config["global_batch_size"] // context.get_world_size()

    _, history = resume(raw_model, optimizer, scheduler)
    nothing = {"seen": [], "totals": [0.0, 0.0, 0.0]}
    unfinished = history.pop() if history and "totals" in history[-1] else nothing
    notice = None
    for epoch in range(len(history), config["num_epochs"]):
        timer = Timer()
        shard = ray.train.get_dataset_shard("rest" if unfinished["seen"] else "train")
        step = len(unfinished["seen"]) // config["global_batch_size"]
        before = unfinished if context.get_world_rank() == 0 else nothing
        seen, totals = list(before["seen"]), torch.tensor(before["totals"], dtype=torch.float64, device=device)
        unfinished = nothing
        model.train()
        for batch in shard.iter_torch_batches(
            batch_size=batch_size,
            drop_last=True,
            local_shuffle_buffer_size=2 * batch_size,
            local_shuffle_seed=config["seed"] + epoch,
        ):
            timer.lap("data")
            totals += train_step(model, optimizer, scheduler, batch, config)
            seen += batch["id"].tolist()
            step += 1
            known, notice = notice, ray.train.get_preemption_info()
            timer.lap("steps")
            is_due = step % config["steps_per_checkpoint"] == 0 or notice != known
            if is_due and step < config["steps_per_epoch"]:
                so_far = merge_over_workers(seen, totals)
                metrics = {"epoch": epoch, "step": step, **train_metrics(so_far)}
                report_with_checkpoint(metrics, raw_model, optimizer, scheduler, [*history, so_far], config)
                timer.lap("report")

        merged = merge_over_workers(seen, totals)
        metrics = {"epoch": epoch, **train_metrics(merged)}
        history.append({**metrics, "seen": merged["seen"], "seconds": timer.seconds})
        report_with_checkpoint(metrics, raw_model, optimizer, scheduler, history, config)
        timer.lap("report")
    return history
