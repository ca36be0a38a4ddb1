"""Each check says "not done yet" to a stub, says what is off to typical mistakes, and accepts a right answer."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from ray.train import Checkpoint, ScalingConfig

from helpers import exercises

RNG = np.random.default_rng(0)
BATCHES = [
    {"image": RNG.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), "label": np.arange(count) % 3}
    for count in (6, 3, 1)
]
IMAGES, LABELS = (np.concatenate([batch[name] for batch in BATCHES]) for name in ("image", "label"))
BRIGHTNESS = np.array([IMAGES[LABELS == label].mean() for label in range(3)])
GREY_DIGITS = {**BATCHES[0], "image": np.repeat(BATCHES[0]["image"][..., :1], 3, axis=-1)}
ENTRIES = [{"step": step} for step in (1, 2, 1, 2, 3)]
RATES = {1: 100.0, 2: 150.0}
PREDICTIONS = {
    "label": np.zeros(10, int),
    "predicted": np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, 1]),  # four correct in the confident half, one in the other
    "confidence": np.linspace(0.95, 0.1, 10),
}
TRIALS = [{"accuracy": [0.5, 0.7, 0.8]}, {"accuracy": [0.1]}, {"accuracy": [0.5, 0.9, 0.9]}, {"accuracy": [0.2]}]


def mean_grey(batch):
    grey = batch["image"].mean(axis=-1, keepdims=True).astype(np.uint8)
    return {**batch, "image": np.repeat(grey, 3, axis=-1)}


def grey_in_place(batch):
    batch["image"][:] = batch["image"].mean(axis=-1, keepdims=True)
    return batch


def overflowing_grey(batch):
    red, green, blue = np.moveaxis(batch["image"], -1, 0)
    return {**batch, "image": np.stack([(red + green + blue) // 3] * 3, axis=-1)}


def weighted_grey(batch):
    grey = (batch["image"] @ [0.299, 0.587, 0.114])[..., None]
    return {**batch, "image": np.repeat(grey, 3, axis=-1).astype(np.uint8)}


def gpu_workers(num_workers=4, **resources):
    return ScalingConfig(num_workers=num_workers, use_gpu=True, resources_per_worker=resources)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ([11, 12, 13, 14], "Expected a function, not [11, 12, 13, 14]"),
        (lambda task: ray.get(task.remote()), "you called it 1 times"),
        (lambda task: [ray.get(task.remote()) for _ in range(4)], "wait for each call before you make the next"),
        (lambda task: [task.remote() for _ in range(4)], "pass the list to ray.get()"),
        (lambda task: print(ray.get([task.remote() for _ in range(4)])), "list of the four process ids, not None"),
        (lambda task: [task.remote() for _ in range(4)] and [1, 2, 3, 4], "four process ids, not [1, 2, 3, 4]"),
        (lambda task: [task() for _ in range(4)], "Your answer raised TypeError"),
        (lambda task: ray.get([task.remote() for _ in range(4)]), "Right: you made four calls"),
        (lambda task: [ray.get(call) for call in [task.remote() for _ in range(4)]], "Right: you made four calls"),
    ],
)
def test_worker_ids(shared_ray, answer, says):
    assert says in exercises.check_worker_ids(answer)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (BRIGHTNESS[:2], "Expected 3 numbers, one per class"),
        (IMAGES.mean(), "Expected 3 numbers, one per class"),
        (dict(enumerate(BRIGHTNESS)), "Expected 3 numbers, one per class"),
        (BRIGHTNESS / 255, "scale 0 to 1"),
        (BRIGHTNESS + [0, 0, 9], "Class 2 should have"),
        (np.full(3, IMAGES.mean()), "average over all its images, no others"),
        ([np.mean([b["image"][b["label"] == n].mean() for b in BATCHES[:2]]) for n in range(3)], "should have"),
        (BRIGHTNESS, "Right"),
        (BRIGHTNESS.astype(np.float32).tolist(), "Right"),
    ],
)
def test_brightness(answer, says):
    assert says in exercises.check_brightness(answer, iter(BATCHES), 3)


@pytest.mark.parametrize("batch", [BATCHES[0], GREY_DIGITS], ids=["coloured", "grey"])
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (lambda batch: None, "forget the return"),
        (lambda batch: {"image": mean_grey(batch)["image"]}, "`label` got lost"),
        (lambda batch: {**batch, "image": batch["image"].mean(axis=-1)}, "repeat the grey value"),
        (lambda batch: {**batch, "image": batch["image"].mean(axis=-1, keepdims=True) + np.zeros(3)}, "stay uint8"),
        (dict, "did not turn grey"),
        (lambda batch: {**batch, "image": np.repeat(batch["image"][..., :1], 3, -1)}, "did not turn grey"),
        (overflowing_grey, "did not turn grey"),
        (weighted_grey, "did not turn grey"),
        (grey_in_place, "read-only"),
        (mean_grey, "Right"),
    ],
)
def test_batch_function(answer, says, batch):
    assert says in exercises.check_batch_function(answer, batch)


def top3_answers():
    """A right function and typical wrong ones; local, so that Ray sends them to its tasks by value."""

    def hits(logits, labels, k=3):
        return (logits.topk(k).indices == labels[:, None]).any(dim=1).float()

    def over_workers(*values):
        totals = torch.tensor([float(value) for value in values])
        torch.distributed.all_reduce(totals)
        return totals

    def right(logits, labels):
        total, count = over_workers(hits(logits, labels).sum(), len(labels))
        return total / count

    def own_shard(logits, labels):
        return hits(logits, labels).mean()

    def mean_of_means(logits, labels):
        return over_workers(own_shard(logits, labels))[0] / 2

    def top1(logits, labels):
        total, count = over_workers(hits(logits, labels, k=1).sum(), len(labels))
        return total.item() / count.item()

    def on_rank_0_only(logits, labels):
        return right(logits, labels) * (torch.distributed.get_rank() == 0)

    def undefined(logits, labels):
        return logits.topk(30)

    return {
        right: "Right",
        own_shard: "its own shard's accuracy",
        mean_of_means: "a mean of accuracies",
        top1: "top-1 accuracy",
        on_rank_0_only: "Both workers should return 0.8, not [0.8",
        undefined: "Your answer raised RuntimeError: selected index k out of range",
    }


def test_top3_accuracy(shared_ray, tmp_path):
    def fit(train_loop, train_loop_config, torch_config):
        """Run the loop in two tasks, which takes a fraction of the time of two training workers."""
        file = tmp_path / str(len(list(tmp_path.iterdir())))

        @ray.remote(num_cpus=0)
        def worker(rank):
            torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
            try:
                return train_loop(train_loop_config)
            finally:
                torch.distributed.destroy_process_group()

        try:
            return SimpleNamespace(return_value=ray.get([worker.remote(rank) for rank in range(2)])[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    for answer, says in top3_answers().items():
        assert says in exercises.check_top3_accuracy(answer, fit)
    assert "Not done yet" in exercises.check_top3_accuracy(..., fit)
    assert "Expected a function, not 0.8" in exercises.check_top3_accuracy(0.8, fit)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (4, "Expected a ScalingConfig, not 4"),
        (gpu_workers(num_workers=2, CPU=4, GPU=2), "should be 4 and is 2"),
        (ScalingConfig(num_workers=4, resources_per_worker={"CPU": 2}), "Without use_gpu"),
        (gpu_workers(), "Expected 8 CPUs and 4 GPUs in total"),
        (gpu_workers(CPU=3), "fit() would wait forever"),
        (gpu_workers(cpu=2), "mind the capitals"),
        (gpu_workers(CPU=2, GPU=4), "Expected 8 CPUs and 4 GPUs in total"),
        (gpu_workers(CPU=2), "Right"),
        (gpu_workers(CPU=2, GPU=1), "leaves 4 of the 12 CPUs for data tasks"),
    ],
)
def test_scaling_config(answer, says):
    assert says in exercises.check_scaling_config(answer)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (0.95, "Expected a function, not 0.95"),
        (lambda result: None, "Return the checkpoint itself, not None"),
        (lambda result: max(result.best_checkpoints, key=lambda pair: pair[1]["validation_accuracy"]), "itself, not ("),
        (lambda result: Checkpoint("/run/epoch-4"), "Return the checkpoint itself, not Checkpoint"),
        (lambda result: result.checkpoint, "That is the latest checkpoint"),
        (lambda result: result.best_checkpoints[-1][0], "That is the latest checkpoint"),
        (lambda result: result.get_best_checkpoint("train_accuracy", "max"), "the best by another metric"),
        (lambda result: result.get_best_checkpoint("validation_loss", "min"), "the best by another metric"),
        (lambda result: result.get_best_checkpoint("validation_accuracy", "min"), 'ask for mode="max"'),
        (lambda result: result.get_best_checkpoint("accuracy", "max"), "Your answer raised"),
        (lambda result: result.get_best_checkpoint("validation_accuracy", "max"), "Right"),
    ],
)
def test_best_checkpoint(answer, says):
    assert says in exercises.check_best_checkpoint(answer)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ([1, 2], "Expected one number, not [1, 2]"),
        (True, "Expected one number, not True"),
        (5, "taken in total"),
        (3, "subtract them from those that were taken"),
        (1, "Not 1"),
        (2, "Right: 2 of 5"),
    ],
)
def test_steps_lost(answer, says):
    assert says in exercises.check_steps_lost(answer, ENTRIES)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ("0.75", "Expected one number, not '0.75'"),
        (1.5, "divide it by the 2 workers"),
        (100 / 150, "upside down"),
        (2 / 1.5, "upside down"),
        (75.0, "Not 75.000"),
        (0.75, "Right: 2 workers run at 75% of ideal speed"),
    ],
)
def test_efficiency(answer, says):
    assert says in exercises.check_efficiency(answer, RATES)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (PREDICTIONS["confidence"] >= 0.5, "Expected one number, not array"),
        ("80 %", "Expected one number, not '80 %'"),
        (0.5, "accuracy on all images"),
        (0.2, "Expected 0.8000, not 0.2000"),
        (4, "Expected 0.8000, not 4.0000"),
        (80.0, "Expected 0.8000, not 80.0000"),
        (np.float64(0.8), "Right: 80.0%, 50.0% on all images; 1 of 5 mistakes"),
    ],
)
@pytest.mark.parametrize("table", [dict, pd.DataFrame])
def test_confident_half(answer, says, table):
    assert says in exercises.check_confident_half(answer, table(PREDICTIONS))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ([2, 2], "Expected one number"),
        (8, "subtract them from those planned"),
        (12, "Not 12"),
        (2, "trials that were stopped"),
        (4, "Right: 8 of 12 planned epochs were reported, 4 saved"),
    ],
)
def test_epochs_saved(answer, says):
    assert says in exercises.check_epochs_saved(answer, TRIALS, 3)
