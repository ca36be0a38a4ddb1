"""The checks of every "Try it": each takes a learner's answer and returns one line, "Right: …" or what is off."""

import functools
import os
import time
from reprlib import repr as short
from types import SimpleNamespace

import numpy as np
import ray
import torch
from ray.train import Checkpoint, Result
from ray.train.torch import TorchConfig


def _check(rules):
    """Make a check of a generator of pairs (does this hold, what to say); the first pair that holds is the result."""

    @functools.wraps(rules)
    def check(answer, *arguments) -> str:
        if answer is ... or (isinstance(answer, tuple) and any(part is ... for part in answer)):
            return "Not done yet: replace the … with your answer and run the cell again."
        try:
            return next(line for holds, line in rules(answer, *arguments) if holds)
        except Exception as error:  # of a learner's function, or of an answer that can't be compared with anything
            reason = str(error).strip().rpartition("\n")[2]  # Ray's errors are long and end with the cause
            return f"Your answer raised {type(error).__name__}: {reason}"

    return check


def _not_numbers(answer, *shape: int) -> tuple[bool, str]:
    """The rule that an answer must be one number or, with a shape, an array of numbers."""
    values, expected = np.asarray(answer), f"{shape[0]} numbers, one per class" if shape else "one number"
    return values.shape != shape or values.dtype.kind not in "iuf", f"Expected {expected}, not {short(answer)}."


@_check
def check_worker_ids(answer):
    """Lesson 00: a function that calls the remote function it is given four times and returns the four process ids."""
    yield not callable(answer), f"Expected a function, not {short(answer)}: write def worker_ids(task)."
    calls, over = [], []

    @ray.remote(num_cpus=0)
    def process_id():
        time.sleep(1)  # all four calls are made before the first is over, unless the learner waits in between
        return os.getpid()

    def remote():
        over.extend(calls and ray.wait(calls, timeout=0)[0])
        calls.append(process_id.remote())
        return calls[-1]

    ids = answer(SimpleNamespace(remote=remote))
    yield len(calls) != 4, f"Call task.remote() four times: you called it {len(calls)} times."
    yield over, "You wait for each call before you make the next: make all four, then call ray.get() once."
    yield ids == calls, "These are references to results that may not exist yet: pass the list to ray.get()."
    yield sorted(ids or []) != sorted(ray.get(calls)), f"Return the list of the four process ids, not {short(ids)}."
    yield True, f"Right: you made four calls before waiting for any; {len(set(ids))} worker process(es) ran them."


@_check
def check_brightness(answer, batches, num_classes: int):
    """Lesson 01: the mean brightness, 0 to 255, of each class; `batches` are dicts with `image` and `label`."""
    total, count = np.zeros(num_classes), np.zeros(num_classes)
    for batch in batches:
        np.add.at(total, batch["label"], batch["image"].mean(axis=(1, 2, 3)))
        np.add.at(count, batch["label"], 1)
    expected = total / np.maximum(count, 1)
    yield _not_numbers(answer, num_classes)
    values = np.where(count > 0, answer, 0)
    yield np.allclose(values, expected, rtol=1e-4), "Right: the mean brightness of every class agrees."
    yield np.allclose(values * 255, expected), "These are on the scale 0 to 1: leave out the division by 255."
    i = np.abs(values - expected).argmax()
    yield True, f"Class {i} should have {expected[i]:.2f}, not {values[i]:.2f}: average over all its images, no others."


@_check
def check_batch_function(answer, batch: dict):
    """Lesson 02: a function that turns a batch's images grey; tried on random colours, read-only as Ray's batches."""
    images = np.random.default_rng(0).integers(0, 256, batch["image"].shape, dtype=np.uint8)
    images.flags.writeable = False
    result = answer({**batch, "image": images})
    yield "image" not in (result or {}), "The column `image` is missing from the result: did you forget the return?"
    has_labels = np.array_equal(result.get("label"), batch["label"])
    yield not has_labels, "The column `label` got lost: return {**batch, 'image': grey} to pass the others on."
    grey = np.asarray(result["image"])
    yield grey.shape != images.shape, f"Keep the shape {images.shape}, not {grey.shape}: repeat the grey value."
    yield grey.dtype != np.uint8, f"The dtype should stay uint8 and became {grey.dtype}: use .astype(np.uint8)."
    is_off = np.abs(grey - images.mean(axis=-1, keepdims=True)).max() > 1
    yield is_off, "A coloured test batch did not turn grey: each channel should hold the mean of the three, axis=-1."
    yield True, "Right: coloured images turn grey, shape and dtype stay, and the labels are kept."


@_check
def check_top3_accuracy(answer, fit):
    """Lesson 03: a function of a worker's logits and labels that returns all workers' top-3 accuracy; run by `fit`."""
    yield not callable(answer), f"Expected a function, not {short(answer)}: write def top3_accuracy(logits, labels)."

    def train_loop(_):
        labels = torch.tensor(([0, 1, 2, 2, 1, 9, 0, 1], [5, 2])[torch.distributed.get_rank()])
        logits = -torch.arange(10.0).repeat(len(labels), 1)  # class 0 has the highest logit, class 1 the next, …
        values = [None, None]
        torch.distributed.all_gather_object(values, float(answer(logits, labels)))
        return values

    values = fit(train_loop, train_loop_config={}, torch_config=TorchConfig(timeout_s=30)).return_value
    yield np.allclose(values, 0.8), "Right: both workers return 8 hits in 10 images, though shards differ in size."
    yield np.allclose(values, [7 / 8, 1 / 2]), "Each worker returns its own shard's accuracy: sum over workers first."
    yield np.allclose(values, 11 / 16), "This is a mean of accuracies, but shards differ in size: sum hits and images."
    yield np.allclose(values, 2 / 10), "This is the top-1 accuracy: look for the label among the three highest logits."
    yield True, f"Both workers should return 0.8, not {values}: divide the hits of all workers by the images of all."


@_check
def check_scaling_config(answer):
    """Lesson 04: a ScalingConfig for 4 workers with a GPU and 2 CPUs each, on a machine with 4 GPUs and 12 CPUs."""
    yield type(answer).__name__ != "ScalingConfig", f"Expected a ScalingConfig, not {short(answer)}."
    yield answer.num_workers != 4, f"num_workers should be 4 and is {answer.num_workers}."
    yield not answer.use_gpu, "Without use_gpu=True the workers would train on the CPU."
    total = answer.total_resources
    yield total.get("CPU", 0) >= 12, "This leaves no CPU for data tasks: fit() would wait forever for a batch."
    yield total != {"CPU": 8, "GPU": 4}, f"Expected 8 CPUs and 4 GPUs in total, not {total}: mind the capitals."
    yield True, f"Right: {total} in total, which leaves 4 of the 12 CPUs for data tasks."


@_check
def check_best_checkpoint(answer):
    """Lesson 05: a function that returns the checkpoint of a Result with the highest validation accuracy."""
    yield not callable(answer), f"Expected a function, not {short(answer)}: write def best(result)."
    first, middle, latest = checkpoints = [Checkpoint(f"/run/epoch-{epoch}") for epoch in (1, 2, 3)]
    names = ("train_accuracy", "validation_accuracy", "validation_loss")
    values = ((0.80, 0.90, 0.30), (0.90, 0.95, 0.40), (0.97, 0.93, 0.25))
    metrics = [dict(zip(names, epoch, strict=True)) for epoch in values]
    best = list(zip(checkpoints, metrics, strict=True))
    value = answer(Result(metrics[-1], latest, error=None, path="/run", best_checkpoints=best))
    yield value not in checkpoints, f"Return the checkpoint itself, not {short(value)}: did you forget the return?"
    yield value == latest, "That is the latest checkpoint, or the best by another metric: go by validation_accuracy."
    yield value == first, 'That one has the lowest validation accuracy: ask for mode="max".'
    yield value == middle, "Right: of three checkpoints you took the second, whose validation accuracy is the highest."


@_check
def check_steps_lost(answer, entries: list[dict]):
    """Lesson 06: how many steps were repeated because workers were killed; each entry of the step log has a `step`."""
    taken, needed = len(entries), len({entry["step"] for entry in entries})
    yield _not_numbers(answer)
    yield answer == taken - needed, f"Right: {answer} of {taken} steps were repeated: no checkpoint held them."
    yield answer == taken, "That is how many steps were taken in total: subtract those that were needed."
    yield answer == needed, "That is how many steps were needed: subtract them from those that were taken."
    yield True, f"Not {answer}: compare the number of entries with the number of different steps in them."


@_check
def check_efficiency(answer, rates: dict[int, float]):
    """Lesson 07: the speed-up of the most workers divided by their number; `rates` has images per second by workers."""
    most = max(rates)
    speed_up = rates[most] / rates[1]
    yield _not_numbers(answer)
    yield np.isclose(answer, speed_up / most, rtol=1e-3), f"Right: {most} workers run at {answer:.0%} of ideal speed."
    yield np.isclose(answer, speed_up), f"That is the speed-up: divide it by the {most} workers that it took."
    yield np.isclose(answer * speed_up, [1, most]).any(), "That is upside down: divide by the rate of one worker."
    yield True, f"Not {answer:.3f}: divide the two throughputs, then divide by the number of workers."


@_check
def check_confident_half(answer, predictions: dict):
    """Lesson 08: the accuracy, 0 to 1, where the confidence is at least its median; columns are arrays (count,)."""
    correct = predictions["predicted"] == predictions["label"]
    confident = predictions["confidence"] >= np.median(predictions["confidence"])
    expected, overall = correct[confident].mean(), correct.mean()
    unseen = f"{np.sum(~correct[confident])} of {np.sum(~correct)} mistakes would go unnoticed"
    yield _not_numbers(answer)
    yield np.isclose(answer, expected, rtol=1e-4), f"Right: {expected:.1%}, {overall:.1%} on all images; {unseen}."
    yield np.isclose(answer, overall), "That is the accuracy on all images: keep only the confident half."
    yield True, f"Expected {expected:.4f}, not {answer:.4f}: the share of correct predictions in the confident half."


@_check
def check_epochs_saved(answer, trials: list[dict], num_epochs: int):
    """Lesson 09: the epochs saved by stopping early; `trials` have a list `accuracy` with one value per epoch."""
    lengths = [len(trial["accuracy"]) for trial in trials]
    trained, planned = sum(lengths), len(trials) * num_epochs
    yield _not_numbers(answer)
    yield answer == planned - trained, f"Right: {trained} of {planned} planned epochs were reported, {answer} saved."
    yield answer == trained, "That is how many epochs the trials reported: subtract them from those planned."
    yield answer == sum(n < num_epochs for n in lengths), "These are the trials that were stopped: count epochs."
    yield True, f"Not {answer}: {num_epochs} epochs per trial were planned; subtract the lengths of `accuracy`."
