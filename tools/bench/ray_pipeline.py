"""The series' own pipeline, measured around `helpers` as the lessons use them."""

import itertools
import os
import shutil
import tempfile
import time

import psutil
import pyarrow.parquet as pq
import ray.data
import ray.train
from ray.train import Checkpoint, RunConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import memory
from baselines import HELD_OUT, MEAN, STD, Steps, bare
from helpers import cluster, data, settings, trainer, training
from helpers.preprocessing import augment_batch, normalize_images
from helpers.training import train_loop_ray_train_ray_data
from images import CLASSES, noise


def settings_for(images: int, **choices) -> settings.Settings:
    """Return settings with a storage folder of their own, where noise has replaced the prepared digits."""
    cfg = settings.Settings(storage=tempfile.mkdtemp(prefix="bench-"), flip="yes", **choices)
    prepared = data.prepare(cfg)
    for split in data.SPLITS:
        shutil.rmtree(f"{prepared}/{split}")
        table = data.to_table(*noise(images if split == "train" else HELD_OUT), CLASSES)
        data.write_split(table, f"{prepared}/{split}")
    return cfg


def timed_loop(config: dict) -> dict:
    """Run the lesson's train loop unchanged; note when it stepped and reported, and what Ray did meanwhile."""
    times = {"started": time.time(), "steps": [], "last_steps": [], "reported": [], "background": []}
    report = ray.train.report

    def after_each_step(*_):
        times["steps"].append(time.time())
        if len(times["steps"]) % config["steps_per_epoch"] in (0, 1):  # an epoch's last or first
            times["background"].append((time.time(), background()))

    def timed_report(*arguments, **named):
        times["last_steps"].append(times["steps"][-1])
        report(*arguments, **named)
        times["reported"].append(time.time())

    register_optimizer_step_post_hook(after_each_step)
    ray.train.report = timed_report
    train_loop_ray_train_ray_data(config)
    return times


def background() -> float:
    """The CPU seconds used by this worker's raylet and by all other processes that the raylet started."""
    worker = psutil.Process()
    raylet = worker.parent()
    others = [process for process in [raylet, *raylet.children(recursive=True)] if process != worker]
    return sum(sum(process.cpu_times()[:2]) for process in others)


def fit(images: int, epochs: int, batch: int, workers: int) -> dict:
    """Train with `fit()` in the running Ray, or in one that is started here; its start then counts.

    An epoch lasts from the end of the previous report to its last step: the bare loop has no evaluation.
    """
    cfg = settings_for(images, epochs=epochs, batch_size=batch, workers=workers)
    moments = {"connect": time.time()}
    cluster.connect()
    run = trainer.build_trainer(cfg)
    run.train_loop_per_worker = timed_loop
    moments["fit"] = time.time()
    times = run.fit().return_value
    moments |= {"end": time.time(), "train_function": times["started"], "first_step": times["steps"][0]}
    begins = [times["started"], *times["reported"]]
    parts = {
        "start": [(moments["fit"], times["started"])],
        "training": list(zip(begins, times["last_steps"], strict=False)),
        "evaluation": list(zip(times["last_steps"], times["reported"], strict=True)),
        "end": [(times["reported"][-1], moments["end"])],
    }
    return {"moments": moments, "spans": parts["training"], "parts": parts, "background": times["background"]}


def plain_loop(config: dict) -> dict:
    """Train with Ray's public calls alone: the steps, a validation, a checkpoint and a report per epoch."""
    times, context = {"started": time.time(), "spans": []}, ray.train.get_context()
    step = Steps(config["images"], config["epochs"], config["batch"])
    step.model = ray.train.torch.prepare_model(step.model)
    share = config["batch"] // context.get_world_size()
    train, validation = (ray.train.get_dataset_shard(name) for name in ("train", "validation"))
    shuffle = {"local_shuffle_buffer_size": config["shuffle_buffer"] // context.get_world_size()}

    def batches(shard, size: int, **options):
        for batch in shard.iter_torch_batches(batch_size=size, **options):
            yield normalize_images(batch["image"], MEAN, STD), batch["label"]

    for epoch in range(config["epochs"]):
        begin = time.time()
        for inputs, labels in batches(train, share, drop_last=True, local_shuffle_seed=epoch, **shuffle):
            step(inputs, labels)
            times.setdefault("first_step", time.time())
        times["spans"].append((begin, time.time()))
        step.validate(batches(validation, 256))
        with tempfile.TemporaryDirectory() as folder:
            is_saved = step.save(folder)
            ray.train.report({"epoch": epoch}, checkpoint=Checkpoint.from_directory(folder) if is_saved else None)
    return times


def plain(images: int, epochs: int, batch: int, workers: int) -> dict:
    """Time `fit()` without `helpers` in the loop: what these steps cost with Ray Train and Ray Data at the least.

    The images, their augmentation, the number of CPUs and Ray's settings are those of the series.
    """
    cfg = settings_for(images, epochs=epochs, batch_size=batch, workers=workers)
    cluster.connect()
    prepared = data.prepare(cfg)
    train, validation = (
        ray.data.read_parquet(f"{prepared}/{split}").materialize() for split in ("train", "validation")
    )
    augmented = train.randomize_block_order().map_batches(augment_batch, fn_kwargs={"flip": True}, batch_size=None)
    sizes = {"images": images, "epochs": epochs, "batch": batch, "shuffle_buffer": min(4096, images // 4)}
    with tempfile.TemporaryDirectory() as storage:
        run = TorchTrainer(
            plain_loop,
            train_loop_config=sizes,
            scaling_config=cluster.scaling_config(cfg),
            run_config=RunConfig(storage_path=storage, name="plain"),
            datasets={"train": augmented, "validation": validation},
        )
        start = time.time()
        times = run.fit().return_value
        moments = {"fit": start, "end": time.time(), "first_step": times["first_step"]}
    return {"moments": moments, "spans": times["spans"]}


def bare_in_worker(config: dict) -> dict:
    """Run the bare loop as a train function: no data to fetch, no evaluation, no checkpoint, no report."""
    started, steps = time.time(), bare(**config)
    first, before = next(steps), background()
    steps = [first, *steps]
    return {"train_function": started, "steps": steps, "background": [(first, before), (steps[-1], background())]}


def fit_overhead(images: int, epochs: int, batch: int, workers: int) -> dict:
    """Time `fit()` around the bare loop: what Ray Train's processes cost, whatever runs in them."""
    cluster.connect()
    with tempfile.TemporaryDirectory() as storage:
        start = time.time()
        result = TorchTrainer(
            bare_in_worker,
            train_loop_config={"images": images, "epochs": epochs, "batch": batch},
            scaling_config=cluster.scaling_config(settings.Settings(workers=workers)),
            run_config=RunConfig(storage_path=storage, name="overhead"),
        ).fit()
        moments = {"fit": start, "end": time.time(), "train_function": result.return_value["train_function"]}
    ends = result.return_value["steps"][:: images // batch]
    noted = result.return_value["background"]
    return {"moments": moments, "spans": list(itertools.pairwise(ends)), "background": noted}


def ingest(images: int, epochs: int, batch: int) -> dict:
    """Take augmented batches, normalise them as the train loop does, and do nothing else with them."""
    cfg = settings_for(images)
    cluster.connect()
    train_ds = data.load("train", cfg)
    dataset = trainer.build_datasets(train_ds, train_ds, flip=True)["train"]
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        taken = 0
        shuffle = {"local_shuffle_buffer_size": 4096}
        for part in dataset.iter_torch_batches(batch_size=batch, drop_last=True, **shuffle):
            taken += len(normalize_images(part["image"], [0.5] * 3, [0.25] * 3))
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds, "images": taken}


def write(images: int) -> dict:
    """Write Parquet with the tensor column."""
    pixels, labels = noise(images)
    with tempfile.TemporaryDirectory() as folder:
        before, start = memory.resident(), time.perf_counter()
        data.write_split(data.to_table(pixels, labels, CLASSES), folder)
        seconds = time.perf_counter() - start
        assert sum(pq.read_metadata(entry.path).num_rows for entry in os.scandir(folder)) == images
    return {"seconds": seconds, "megabytes": memory.peak() - before}


def folder(path: str) -> dict:
    """Turn a folder of JPEGs into Parquet, twice, in a Ray that was started ten seconds earlier."""
    cluster.connect()
    time.sleep(10)
    seconds = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as storage:
            start = time.perf_counter()
            data.prepare(settings.Settings(data=path, storage=storage))
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "again": seconds[1]}


def small_model_loop(config: dict) -> dict:
    """Run the lesson's train loop with a linear model, so that reading is what takes the time."""
    training.build_model = lambda classes, size: nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, classes))
    return timed_loop(config)


def stream(times: int, store_megabytes: int) -> dict:
    """Train with two workers on `times` as many bytes of images as the object store holds, for two epochs."""
    ray.init(
        num_cpus=cluster.logical_cpus(),
        object_store_memory=store_megabytes * 10**6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    cluster.connect()  # applies the settings of the series
    images = store_megabytes * 10**6 // 32**2 // 3
    cfg = settings_for(images, epochs=2, workers=2)
    train_folder = f"{data.prepare(cfg)}/train"
    for file in list(os.scandir(train_folder)):
        for copy in range(1, times):
            os.symlink(file.path, f"{train_folder}/{copy}-{file.name}")
    run = trainer.build_trainer(cfg)
    assert run.datasets["train"].count() == images * times
    run.train_loop_per_worker = small_model_loop
    with memory.Watch() as watch:
        noted = run.fit().return_value
    begins = [noted["started"], *noted["reported"][:-1]]
    firsts = noted["steps"][:: len(noted["steps"]) // 2]
    return {
        "seconds": [end - begin for begin, end in zip(begins, noted["last_steps"], strict=True)],
        "first_batch": [first - begin for begin, first in zip(begins, firsts, strict=True)],
        "megabytes": watch.most,
        "spilled": memory.spilled(),
    }
