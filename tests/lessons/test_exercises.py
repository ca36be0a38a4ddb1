"""Each check says "not done yet" to a stub, says what is off to typical mistakes, and accepts a right answer."""

import contextlib
import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray import serve, tune
from ray.train import Checkpoint, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import exercises
import serving

# Answers are sent to workers as a notebook's are: whole, since no worker can import where they were written.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

RNG = np.random.default_rng(0)
BATCHES = [
    {"image": RNG.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), "label": np.arange(count) % 3}
    for count in (6, 3, 1)
]
IMAGES, LABELS = (np.concatenate([batch[name] for batch in BATCHES]) for name in ("image", "label"))
BRIGHTNESS = np.array([IMAGES[LABELS == label].mean() for label in range(3)])
GREY_DIGITS = {**BATCHES[0], "image": np.repeat(BATCHES[0]["image"][..., :1], 3, axis=-1)}


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
        (lambda batch: {"image": mean_grey(batch)["image"]}, "['label', 'row'] got lost"),
        (lambda batch: {"image": mean_grey(batch)["image"], "label": batch["label"]}, "['row'] got lost"),
        (lambda batch: mean_grey(batch)["image"], "Return a dict of columns, not array"),
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


def test_top3_accuracy(shared_ray):
    for answer, says in top3_answers().items():
        assert says in exercises.check_top3_accuracy(answer)
    assert "Not done yet" in exercises.check_top3_accuracy(...)
    assert "Expected a function, not 0.8" in exercises.check_top3_accuracy(0.8)


def reading(**options):
    """An answer that reads batches of 32 rows with these options; a seed of "epoch" stands for the epoch's number."""

    def batches(dataset, epoch, blocks=False):
        dataset = dataset.randomize_block_order(seed=epoch) if blocks else dataset
        seed = {"local_shuffle_seed": epoch} if options.get("local_shuffle_seed") == "epoch" else {}
        return dataset.iter_batches(**{"batch_size": 32, "drop_last": True, **options, **seed})

    return batches


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (32, "Expected a function, not 32"),
        (reading(batch_size=48), "should have 32 rows"),
        (reading(), "not shuffled"),
        (reading(local_shuffle_buffer_size=256), "set local_shuffle_seed"),
        (reading(local_shuffle_buffer_size=256, local_shuffle_seed=7), "depend on the epoch"),
        (reading(local_shuffle_buffer_size=2048, local_shuffle_seed="epoch"), "Use less buffer"),
        (reading(local_shuffle_buffer_size=256, local_shuffle_seed="epoch"), "Right"),
        (functools.partial(reading(local_shuffle_buffer_size=256, local_shuffle_seed="epoch"), blocks=True), "Right"),
        (lambda dataset, epoch: dataset.limit(1024).iter_batches(batch_size=32), "each row once"),
    ],
)
def test_batches(answer, says, shared_ray):
    assert says in exercises.check_batches(answer)


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
        (lambda result: result.get_best_checkpoint("validation_accuracy", "min"), 'with mode="max"'),
        (lambda result: result.get_best_checkpoint("validation_loss", "max"), "go by validation_accuracy"),
        (lambda result: result.get_best_checkpoint("accuracy", "max"), "Your answer raised"),
        (lambda result: result.get_best_checkpoint("validation_accuracy", "max"), "Right"),
    ],
)
def test_best_checkpoint(answer, says):
    assert says in exercises.check_best_checkpoint(answer)


def reports(config, ranks=(0, 1), attach=(0,), create=()):
    """A train loop in which `ranks` report, those in `attach` with a checkpoint; those in `create` only make one."""
    rank = ray.train.get_context().get_world_rank()
    for epoch in range(config["num_epochs"]):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "epoch.txt").write_text(str(epoch))
            checkpoint = Checkpoint.from_directory(folder) if rank in {*attach, *create} else None
            if rank in ranks:
                ray.train.report({"epoch": epoch}, checkpoint=checkpoint if rank in attach else None)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ("report", "Expected a function, not 'report'"),
        (lambda config: reports(config, ranks=(0,)), "one worker waited for the other"),
        (lambda config: reports(config, attach=()), "Expected two checkpoints"),
        (lambda config: reports(config, attach=(0, 1)), "Rank 1 attached a checkpoint"),
        (lambda config: reports(config), "Right"),
        (lambda config: reports(config, create=(0, 1)), "Right"),
    ],
)
def test_reports(shared_ray, answer, says):
    assert says in exercises.check_reports(answer)


def is_due_by_own_clock(last, interval):
    return time.monotonic() - last > interval


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (True, "Expected a function, not True"),
        (is_due_by_own_clock, "The clocks differ, and so do the workers"),
        (lambda last, interval: True, "after 0 s not"),
        (lambda last, interval: True if torch.distributed.get_rank() == 0 else None, "on every worker, not None"),
        (lambda last, interval: broadcast_from_rank_zero(is_due_by_own_clock(last, interval)), "Right"),
    ],
)
def test_is_due(shared_ray, answer, says):
    assert says in exercises.check_is_due(answer)


def elastic(fewest, most, **options):
    options = {"use_gpu": True, "elastic_resize_monitor_interval_s": 30, **options}
    return ScalingConfig(num_workers=(fewest, most), **options)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (ScalingConfig(num_workers=(8, 32)), "Expected a function"),
        (lambda gpus, fewest, most: (8, 32), "Return a ScalingConfig, not (8, 32)"),
        (lambda gpus, fewest, most: elastic(fewest, most), "These are nodes"),
        (lambda gpus, fewest, most: elastic(gpus, gpus * most), "should be (8, 32), not (4, 32)"),
        (lambda gpus, fewest, most: elastic(gpus * fewest, gpus * most, use_gpu=False), "Without use_gpu=True"),
        (
            lambda gpus, fewest, most: elastic(gpus * fewest, gpus * most, elastic_resize_monitor_interval_s=60),
            "Every 60 s is not every 30 s",
        ),
        (
            lambda gpus, fewest, most: elastic(gpus * fewest, gpus * most, resources_per_worker={"GPU": gpus}),
            "A worker takes one GPU, not 4",
        ),
        (lambda gpus, fewest, most: elastic(gpus * fewest, gpus * most), "Right: 8 to 32 workers"),
    ],
)
def test_elastic(answer, says):
    assert says in exercises.check_elastic(answer)


def accumulate_gradients(model, optimizer, batches, accumulate, local=True, mean=True):
    """Train with one step per group; without `local` exchange each time, without `mean` take too long steps."""
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        for number, (images, labels) in enumerate(group, start=1):
            with model.no_sync() if local and number < len(group) else contextlib.nullcontext():
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                (loss / len(group) if mean else loss).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (0.75, "Expected a function, not 0.75"),
        (functools.partial(accumulate_gradients, local=False), "5 batches made 5 exchanges"),
        (functools.partial(accumulate_gradients, mean=False), "not those of large batches"),
        (accumulate_gradients, "Right"),
    ],
)
def test_accumulation(shared_ray, answer, says):
    assert says in exercises.check_accumulation(answer)


def shard(model, layers=True):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model if layers else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        (2, "Expected a function, not 2"),
        (lambda model: model, "Nothing was sharded"),
        (functools.partial(shard, layers=False), "Not every layer is a unit"),
        (shard, "Right"),
    ],
)
def test_sharding(shared_ray, answer, says):
    assert says in exercises.check_sharding(answer)


def per_image(images):
    return [{"mean": float(image.mean()), "batch": len(images)} for image in images]


def deployed(function, batched=True, **arguments):
    """A deployment whose `__call__` is `function`, batched or not."""

    class Brightness:
        async def __call__(self, images):
            return function(images)

    if batched:
        Brightness.__call__ = serve.batch(Brightness.__call__, **arguments)
    return serve.deployment(Brightness)


RIGHT = {"max_batch_size": 8, "batch_wait_timeout_s": 0.05}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda: ..., "Not done yet"),
        (lambda: per_image, "Expected a class under @serve.deployment"),
        (lambda: deployed(per_image, batched=False), "Under @serve.batch return a list"),
        (lambda: deployed(lambda images: [image.mean() for image in images], **RIGHT), 'with a dict "mean", "batch"'),
        (lambda: deployed(lambda images: per_image(images[::-1]), **RIGHT), "don't belong to the images"),
        (lambda: deployed(per_image, batch_wait_timeout_s=0.05), "up to 10: set max_batch_size=8"),
        (lambda: deployed(per_image, max_batch_size=8, batch_wait_timeout_s=50), "took 15 s or more: set batch_wait"),
        (lambda: deployed(per_image, **RIGHT), "Right: 20 images"),
    ],
)
@pytest.mark.usefixtures("shared_serve")
def test_serve_batch(answer, says):
    assert says in exercises.check_serve_batch(answer())


@pytest.fixture(scope="module")
def shared_serve(shared_ray):
    name = serving.start()
    yield
    serving.stop(name)


SPACE = {
    "learning_rate": tune.loguniform(1e-4, 1e-1),
    "weight_decay": tune.loguniform(1e-5, 1e-2),
    "batch_size": tune.choice([32, 64, 128]),
}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ({"learning_rate": 0.1}, "Expected a dict with"),
        ({**SPACE, "learning_rate": tune.uniform(1e-4, 1e-1)}, "draw the logarithm evenly"),
        ({**SPACE, "learning_rate": tune.choice([1e-4, 1e-3, 1e-2, 1e-1])}, "only 4 different values"),
        ({**SPACE, "weight_decay": tune.loguniform(1e-5, 1)}, "not from 1e-05 to 0.01"),
        ({**SPACE, "batch_size": tune.grid_search([32, 64, 128])}, "['batch_size'] is not drawn at random"),
        ({**SPACE, "batch_size": tune.randint(32, 129)}, "should be 32, 64 or 128"),
        (SPACE, "Right"),
    ],
)
def test_search_space(answer, says):
    assert says in exercises.check_search_space(answer)


def retry(client, entrypoint, attempts, waits=True, again=("FAILED",), limited=True):
    """Submit jobs until one ends otherwise than `again` says: right by default, and wrong in the ways of learners."""
    count = 0
    while count < attempts or not limited:
        count += 1
        job = client.submit_job(entrypoint=entrypoint)
        while waits and not client.get_job_status(job).is_terminal():
            pass
        status = client.get_job_status(job)
        if status not in again:
            break
    return status


def retry_by_names(client, entrypoint, attempts, ends=("SUCCEEDED", "FAILED")):
    """Name the ends and the parameter, as in Ray's documentation; by default one of the ends is missing."""
    for _ in range(attempts):
        job = client.submit_job(entrypoint=entrypoint)
        while (status := client.get_job_status(job_id=job)) not in ends:
            pass
        if status != "FAILED":
            break
    return status


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (..., "Not done yet"),
        ("FAILED", "Expected a function, not 'FAILED'"),
        (lambda client, entrypoint, attempts: client.submit_job(entrypoint=entrypoint), "was not submitted again"),
        (functools.partial(retry, waits=False), "wait for its end before you look"),
        (functools.partial(retry, again=("FAILED", "SUCCEEDED")), "a third one was submitted"),
        (lambda *arguments: bool(retry(*arguments)), "return its status, not True"),
        (functools.partial(retry, limited=False), "With 2 attempts, 4 jobs were submitted"),
        (lambda client, entrypoint, attempts: retry(client, entrypoint, attempts + 1), "With 2 attempts, 3 jobs"),
        (functools.partial(retry, again=("FAILED", "STOPPED")), "look for FAILED"),
        (lambda client: client.submit_job(), "Your answer raised TypeError"),
        (retry_by_names, "you still wait for a job that has STOPPED"),
        (functools.partial(retry_by_names, ends=("SUCCEEDED", "FAILED", "STOPPED")), "Right: a failed job"),
        (retry, "Right: a failed job"),
    ],
)
def test_retries(answer, says):
    assert says in exercises.check_retries(answer)
