"""The checks of every "Try it": each takes a learner's answer and returns one line, "Right: …" or what is off."""

import functools
import os
import tempfile
import time
import timeit
import traceback
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from reprlib import repr as short
from types import SimpleNamespace

import numpy as np
import ray
import torch
from ray.train import Checkpoint, Result, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


def _check(signature: str = ""):
    """Make a check of a generator of pairs (does this hold, what to say); the first pair that holds is the result.

    With a `signature`, the answer must be a function.
    """

    def decorate(rules):
        @functools.wraps(rules)
        def check(answer, *arguments) -> str:
            if answer is ...:
                return "Not done yet: replace the … with your answer and run the cell again."
            if signature and not callable(answer):
                return f"Expected a function, not {short(answer)}: write def {signature}."
            try:
                return next(line for holds, line in rules(answer, *arguments) if holds)
            except Exception as error:  # of a learner's function, or of an answer that can't be compared with anything
                lines = traceback.format_exception_only(error)  # Ray's errors are long and end with the cause
                return f"Your answer raised {''.join(lines).strip().splitlines()[-1]}"

        return check

    return decorate


def _on_two_workers(function, **config) -> list:
    """Return what `function(config)` returns in two workers, by rank; RuntimeError if one waits for the other."""

    def train_loop(config):
        by_rank = [None, None]
        torch.distributed.all_gather_object(by_rank, function(config))
        return by_rank

    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = "10"  # a worker that waits alone fails instead of hanging
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    here = {"ray.io/node-id": node["NodeID"]} if node["Resources"].get("CPU") else None  # where the folder is
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = TorchTrainer(
                train_loop,
                train_loop_config=config,
                scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.1}, label_selector=here),
                run_config=RunConfig(storage_path=folder),
                torch_config=TorchConfig(timeout_s=30),
            )
            return trainer.fit().return_value
    except WorkerGroupError as error:
        first = next(iter(error.worker_failures.values()))
        if "have not joined the collective operation" in str(first):
            raise RuntimeError("one worker waited for the other: both must make the same calls of Ray Train") from None
        raise first from None
    finally:
        del os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"]


def _in_two_processes(function) -> list:
    """Return what `function()` returns in two processes of one gloo group, by rank: seconds sooner than a `fit()`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

    @ray.remote(num_cpus=0, scheduling_strategy=here)
    def process(rank, store):
        torch.distributed.init_process_group("gloo", store, timedelta(seconds=30), world_size=2, rank=rank)
        try:
            return function()
        except Exception as error:  # returned, because Ray would print what the second process raises
            return error
        finally:
            torch.distributed.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        values = ray.get([process.remote(rank, f"file://{folder}/store") for rank in range(2)])
    for error in values:
        if isinstance(error, Exception):
            raise error
    return values


@_check("worker_ids(task)")
def check_worker_ids(answer):
    """Lesson 00: a function that calls the remote function it is given four times and returns the four process ids."""
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


@_check()
def check_brightness(answer, batches, num_classes: int):
    """Lesson 01: the mean brightness, 0 to 255, of each class; `batches` are dicts with `image` and `label`."""
    total, count = np.zeros(num_classes), np.zeros(num_classes)
    for batch in batches:
        np.add.at(total, batch["label"], batch["image"].mean(axis=(1, 2, 3)))
        np.add.at(count, batch["label"], 1)
    expected = total / np.maximum(count, 1)
    values = np.asarray(answer)
    are_numbers = values.shape == expected.shape and values.dtype.kind in "iuf"
    yield not are_numbers, f"Expected {num_classes} numbers, one per class, not {short(answer)}."
    values = np.where(count > 0, values, 0)
    yield np.allclose(values, expected, rtol=1e-4), "Right: the mean brightness of every class agrees."
    yield np.allclose(values * 255, expected), "These are on the scale 0 to 1: leave out the division by 255."
    i = np.abs(values - expected).argmax()
    yield True, f"Class {i} should have {expected[i]:.2f}, not {values[i]:.2f}: average over all its images, no others."


@_check()
def check_batch_function(answer, batch: dict):
    """Lesson 02: a function that turns a batch's images grey; tried on random colours, read-only as Ray's batches."""
    images = np.random.default_rng(0).integers(0, 256, batch["image"].shape, dtype=np.uint8)
    images.flags.writeable = False
    batch = {**batch, "image": images, "row": np.arange(len(images))}
    result = answer(batch)
    yield not isinstance(result, dict | None), f"Return a dict of columns, not {short(result)}."
    yield "image" not in (result or {}), "The column `image` is missing from the result: did you forget the return?"
    lost = [name for name in batch if name != "image" and not np.array_equal(result.get(name), batch[name])]
    yield lost, f"Column(s) {lost} got lost: return {{**batch, 'image': grey}} to pass the others on."
    grey = np.asarray(result["image"])
    yield grey.shape != images.shape, f"Keep the shape {images.shape}, not {grey.shape}: repeat the grey value."
    yield grey.dtype != np.uint8, f"The dtype should stay uint8 and became {grey.dtype}: use .astype(np.uint8)."
    is_off = np.abs(grey - images.mean(axis=-1, keepdims=True)).max() > 1
    yield is_off, "A coloured test batch did not turn grey: each channel should hold the mean of the three, axis=-1."
    yield True, "Right: coloured images turn grey, shape and dtype stay, and the other columns are kept."


@_check("top3_accuracy(logits, labels)")
def check_top3_accuracy(answer):
    """Lesson 03: a function of a worker's logits and labels that returns all workers' top-3 accuracy."""

    def call():
        labels = torch.tensor(([0, 1, 2, 2, 1, 9, 0, 1], [5, 2])[torch.distributed.get_rank()])
        logits = -torch.arange(10.0).repeat(len(labels), 1)  # class 0 has the highest logit, class 1 the next, …
        return float(answer(logits, labels))

    values = _in_two_processes(call)
    yield np.allclose(values, 0.8), "Right: both workers return 8 hits in 10 images, though shards differ in size."
    yield np.allclose(values, [7 / 8, 1 / 2]), "Each worker returns its own shard's accuracy: sum over workers first."
    yield np.allclose(values, 11 / 16), "This is a mean of accuracies, but shards differ in size: sum hits and images."
    yield np.allclose(values, 2 / 10), "This is the top-1 accuracy: look for the label among the three highest logits."
    yield True, f"Both workers should return 0.8, not {values}: divide the hits of all workers by the images of all."


@_check()
def check_scaling_config(answer):
    """Lesson 04: a ScalingConfig for 4 workers with a GPU and 2 CPUs each, on a machine with 4 GPUs and 12 CPUs."""
    yield type(answer).__name__ != "ScalingConfig", f"Expected a ScalingConfig, not {short(answer)}."
    yield answer.num_workers != 4, f"num_workers should be 4 and is {answer.num_workers}."
    yield not answer.use_gpu, "Without use_gpu=True the workers would train on the CPU."
    total = answer.total_resources
    yield total.get("CPU", 0) >= 12, "This leaves no CPU for data tasks: fit() would wait forever for a batch."
    yield total != {"CPU": 8, "GPU": 4}, f"Expected 8 CPUs and 4 GPUs in total, not {total}: mind the capitals."
    yield True, f"Right: {total} in total, which leaves 4 of the 12 CPUs for data tasks."


@_check("best(result)")
def check_best_checkpoint(answer):
    """Lesson 05: a function that returns the checkpoint of a Result with the highest validation accuracy."""
    first, middle, latest = checkpoints = [Checkpoint(f"/run/epoch-{epoch}") for epoch in (1, 2, 3)]
    names = ("train_accuracy", "validation_accuracy", "validation_loss")
    values = ((0.80, 0.90, 0.40), (0.90, 0.95, 0.30), (0.97, 0.93, 0.25))
    metrics = [dict(zip(names, epoch, strict=True)) for epoch in values]
    best = list(zip(checkpoints, metrics, strict=True))
    value = answer(Result(metrics[-1], latest, error=None, path="/run", best_checkpoints=best))
    yield value not in checkpoints, f"Return the checkpoint itself, not {short(value)}: did you forget the return?"
    yield value == latest, "That is the latest checkpoint, or the best by another metric: go by validation_accuracy."
    yield value == first, 'That one has the lowest validation accuracy: go by validation_accuracy, with mode="max".'
    yield value == middle, "Right: of three checkpoints you took the second, whose validation accuracy is the highest."


@_check("batches(dataset, epoch)")
def check_batches(answer):
    """Lesson 06: a function that returns an epoch's batches of 32 rows, in a new order but not by reading all first."""
    dataset = ray.data.range(2048, override_num_blocks=16).materialize()
    epochs = [[batch["id"].tolist() for batch in answer(dataset, epoch)] for epoch in (0, 0, 1)]
    sizes = {len(batch) for epoch in epochs for batch in epoch}
    yield sizes != {32}, f"All batches should have 32 rows, not {sorted(sizes)}: set drop_last=True."
    rows = [sum(epoch, []) for epoch in epochs]
    yield sorted(rows[0]) != list(range(2048)), "An epoch should have each row once."
    yield rows[0] == list(range(2048)), "The rows are not shuffled: use local_shuffle_buffer_size."
    yield rows[0] != rows[1], "The same epoch should have the same order again: set local_shuffle_seed."
    yield rows[0] == rows[2], "Epochs 0 and 1 have the same order: let local_shuffle_seed depend on the epoch."
    blocks = {row // 128 for row in rows[0][:32]}
    yield len(blocks) > 7, f"The first batch waited for {len(blocks)} of 16 blocks, or more. Use less buffer."
    yield True, "Right: each epoch has its own order, and the first batch waits for a few blocks only."


@_check("train_loop(config)")
def check_reports(answer):
    """Lesson 07: a train loop that reports each epoch on two workers; rank 0 attaches `epoch.txt`, the epoch."""

    def report(config):
        report_it, attached = ray.train.report, []

        def note(metrics, checkpoint=None, *others, **options):
            attached.extend([1] if checkpoint else [])
            return report_it(metrics, checkpoint, *others, **options)

        ray.train.report = note
        names = getattr(answer, "__globals__", {})
        names.update({name: note for name, value in names.items() if value is report_it})  # if imported by its name
        answer(config)
        kept = ray.train.get_all_reported_checkpoints()
        files = [Path(one.checkpoint.path, "epoch.txt") for one in kept]
        texts = [file.read_text().strip() if file.exists() else "missing" for file in files]
        return [one.metrics.get("epoch") for one in kept], texts, attached

    (epochs, texts, _), (*_, attached) = _on_two_workers(report, num_epochs=2)
    yield epochs != [0, 1], f"Expected two checkpoints, reported with {{'epoch': 0}} and {{'epoch': 1}}, not {epochs}."
    yield texts != ["0", "1"], f"The files epoch.txt in the checkpoints should hold 0 and 1, not {texts}."
    yield attached, "Rank 1 attached a checkpoint as well: only rank 0 should, the copies are equal."
    yield True, "Right: both workers report both epochs, and rank 0 attaches the checkpoint."


@_check("is_due(last, interval)")
def check_is_due(answer):
    """Lesson 08: a function of a worker's last time and an interval, in seconds; all workers must return rank 0's."""
    ages = [(5, 0), (0, 5), (5, 5), (0, 0)]  # seconds since the last checkpoint, by the clocks of ranks 0 and 1

    def call(_):
        rank = torch.distributed.get_rank()
        return [answer(time.monotonic() - pair[rank], 3) for pair in ages]

    first, second = _on_two_workers(call)
    others = [value for value in first + second if type(value) is not bool]
    yield others, f"Return True or False on every worker, not {short(next(iter(others), None))}."
    yield first != second, f"The clocks differ, and so do the workers: {first} and {second}. Let rank 0 decide for all."
    yield first == [age > 3 for age, _ in ages], "Right: both workers return what rank 0's clock says."
    yield True, f"With an interval of 3 s, {ages[0][0]} s after the last checkpoint it is due, after 0 s not: {first}."


@_check("build_scaling_config(…)")
def check_elastic(answer):
    """Lesson 09: a function of GPUs per node and the fewest and most nodes that returns an elastic ScalingConfig."""
    config = answer(4, 2, 8)
    yield type(config).__name__ != "ScalingConfig", f"Return a ScalingConfig, not {short(config)}."
    got, interval = config.num_workers, config.elastic_resize_monitor_interval_s
    yield got == (2, 8), "These are nodes: num_workers counts workers, and a node with 4 GPUs has 4."
    yield got != (8, 32), f"For 2 to 8 nodes with 4 GPUs each, num_workers should be (8, 32), not {got}."
    yield not config.use_gpu, "Without use_gpu=True the workers would train on the CPU."
    gpus = config.num_gpus_per_worker
    yield gpus != 1, f"A worker takes one GPU, not {gpus:g}: leave resources_per_worker out."
    yield interval != 30, f"Every {interval:g} s is not every 30 s: set elastic_resize_monitor_interval_s."
    yield True, "Right: 8 to 32 workers with a GPU each, and Ray Train checks every 30 s whether to resize."


@_check("train_epoch(…)")
def check_accumulation(answer):
    """Lesson 10: a function that trains with DDP for an epoch; `accumulate` batches make one exchange and one step."""

    def with_large_batches(model, optimizer, batches, accumulate):
        for start in range(0, len(batches), accumulate):
            images, labels = map(torch.cat, zip(*batches[start : start + accumulate], strict=True))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    def train(function):
        torch.manual_seed(torch.distributed.get_rank())
        batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(5)]
        torch.manual_seed(0)
        model, exchanges = DistributedDataParallel(torch.nn.Linear(8, 3)), []
        model.register_comm_hook(None, lambda _, bucket: exchanges.append(1) or allreduce_hook(None, bucket))
        function(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, 2)
        return torch.cat([weights.detach().flatten() for weights in model.parameters()]).tolist(), len(exchanges)

    (expected, _), (weights, exchanges) = _in_two_processes(lambda: (train(with_large_batches), train(answer)))[0]
    yield exchanges == 5, "5 batches made 5 exchanges: all batches but the last of a group belong inside no_sync()."
    yield exchanges != 3, f"Groups of 2, 2 and 1 batches need 3 exchanges, not {exchanges}: mind the last group."
    wrong = not np.allclose(weights, expected, atol=1e-5)
    yield wrong, "The weights are not those of large batches: one step per group with its mean loss, then zero_grad()."
    yield True, "Right: 3 exchanges for 5 batches in groups of two, and the weights are those of large batches."


@_check("shard(model)")
def check_sharding(answer):
    """Lesson 11: a function that applies FSDP2 to each layer of a Sequential and to the whole, and returns it."""
    from torch.distributed.fsdp import FSDPModule  # here, since the other lessons do without

    def call():
        model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
        sharded = answer(model)
        held = sum((part.to_local() if hasattr(part, "to_local") else part).numel() for part in model.parameters())
        return sharded is model, [isinstance(layer, FSDPModule) for layer in [*model, model]], held

    is_returned, units, held = _in_two_processes(call)[0]
    yield not is_returned, "Return the model."
    yield not any(units), "Nothing was sharded: call fully_shard."
    yield not all(units[:-1]), "Not every layer is a unit of its own: too much would be gathered at once."
    yield not units[-1], "The whole model was left out: call fully_shard on it last."
    yield True, f"Right: each layer is gathered on its own, and rank 0 holds {held} of {4 * 16 * 17} parameters."


@_check()
def check_serve_batch(answer):
    """Lesson 12: a deployment that batches single images, 8 at most, and returns a dict `mean`, `batch` for each."""
    yield type(answer).__name__ != "Deployment", f"Expected a class under @serve.deployment, not {short(answer)}."
    from ray import serve  # here, since the other lessons do without

    name = f"check-{uuid.uuid4().hex[:8]}"
    images = [np.full((4, 4, 3), brightness, np.uint8) for brightness in range(20)]

    def deploy_and_call():
        quick = answer.options(ray_actor_options={"num_cpus": 0}, num_replicas=1, max_ongoing_requests=100)
        handle = serve.run(quick.bind(), name=name, route_prefix=None)
        call = lambda: handle.remote(images[0]).result(timeout_s=15)  # noqa: E731
        waited = min(timeit.repeat(call, number=1, repeat=3))  # the quickest, since the machine may be busy
        return call(), [response.result() for response in [handle.remote(image) for image in images]], waited

    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop, where one would have to await
            alone, results, waited = thread.submit(deploy_and_call).result()
    except TimeoutError:
        waited = 15
    finally:
        serve.delete(name)
    yield waited > 2, f"An image sent alone took {waited:.0f} s or more: set batch_wait_timeout_s=0.05, in seconds."
    keys = isinstance(alone, dict) and {"mean", "batch"} <= set(alone)
    yield not keys, f'Under @serve.batch return a list with a dict "mean", "batch" per image, not {short(alone)}.'
    yield alone["batch"] != 1, f"`batch` is the number of images, len(images): one sent alone had {alone['batch']}."
    wrong = [result["mean"] for result in results] != list(range(20))
    yield wrong, "The means don't belong to the images that were sent: keep the order, and give each image its own."
    most = max(result["batch"] for result in results)
    yield most == 1, "Each of 20 images came in a batch of its own: is the method async and under @serve.batch?"
    yield most > 8, f"20 images at once came in batches of up to {most}: set max_batch_size=8."
    yield True, f"Right: 20 images sent at once came back in order, in batches of up to {most}."


@_check()
def check_search_space(answer):
    """Lesson 13: a `param_space` of rate, weight decay and batch size; 200 trials are drawn from it, none is run."""
    names = {"learning_rate", "weight_decay", "batch_size"}
    yield not isinstance(answer, dict) or set(answer) != names, f"Expected a dict with {sorted(names)}."
    fixed = [name for name in sorted(names) if not hasattr(answer[name], "sample")]
    yield fixed, f"{fixed} is not drawn at random: use tune.loguniform or tune.choice, not a list or grid_search."
    drawn = [{name: answer[name].sample() for name in names} for _ in range(200)]
    sizes = {config["batch_size"] for config in drawn}
    yield sizes != {32, 64, 128}, f"batch_size should be 32, 64 or 128, not {short(sorted(sizes))}: use tune.choice."
    for name, low, high in (("learning_rate", 1e-4, 1e-1), ("weight_decay", 1e-5, 1e-2)):
        values = np.array([config[name] for config in drawn], float)
        outside = values.min() < low or values.max() > high or values.max() / values.min() < high / low / 4
        below = np.mean(values < (low * high) ** 0.5)
        yield len(set(values)) < 50, f"{name} has only {len(set(values))} different values: draw it from a range."
        yield below < 0.15, f"Only {below:.0%} of {name} are small: draw the logarithm evenly, with tune.loguniform."
        yield outside, f"{name} goes from {values.min():.2g} to {values.max():.2g}, not from {low:g} to {high:g}."
    yield True, "Right: 200 trials cover both ranges evenly by their logarithm, and all three batch sizes."


@_check("run_until_done(…)")
def check_retries(answer):
    """Lesson 14: a function of a client, an entrypoint and the most attempts, which submits a failed job again."""
    from ray.job_submission import JobStatus  # here, since the other lessons do without

    def run(attempts, *ends):  # on a pretended cluster: the n-th job is pending, runs, and ends with the n-th of `ends`
        jobs = []
        submit = lambda **_: jobs.append(iter(("PENDING", "RUNNING"))) or len(jobs) - 1  # noqa: E731
        asked = Counter()

        def look(job_id):
            asked[job_id] += 1
            status = next(jobs[job_id], ends[min(job_id, len(ends) - 1)])
            if asked[job_id] > 50:
                raise TimeoutError(f"you still wait for a job that has {status}, which is an end")
            return JobStatus(status)

        return answer(SimpleNamespace(submit_job=submit, get_job_status=look), "python train.py", attempts), len(jobs)

    status, count = run(3, "FAILED", "SUCCEEDED")
    yield count == 1, "The first job failed and was not submitted again: wait for its end before you look."
    yield count > 2, "The second job succeeded, and yet a third one was submitted."
    yield status != "SUCCEEDED", f"The second job succeeded: return its status, not {short(status)}."
    status, count = run(2, "FAILED", "FAILED", "FAILED", "SUCCEEDED")
    yield count != 2, f"With 2 attempts, {count} jobs were submitted, which all failed."
    yield status != "FAILED", f"Both jobs failed: return the last status, not {short(status)}."
    yield run(3, "STOPPED", "SUCCEEDED")[1] > 1, "A job that a person had stopped was submitted again: look for FAILED."
    yield True, "Right: a failed job is submitted again, as often as allowed, and a stopped one is not."
