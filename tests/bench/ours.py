"""The series' own way, measured around `helpers` as the lessons use it."""

import itertools
import os
import tempfile
import time

import memory
import psutil
import pyarrow.parquet as pq
import ray.data
import ray.train
from baselines import bare
from pictures import CLASSES, noise
from ray.train import RunConfig
from ray.train.torch import TorchTrainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from helpers import cluster, data, settings, trainer
from helpers.preprocessing import normalize_images
from helpers.training import train_loop_ray_train_ray_data

TEST_ROWS = 500


def _storage_with(rows: int, **choices) -> settings.Settings:
    """Return settings whose prepared data are noise: they lie where the prepared digits would lie."""
    storage = tempfile.mkdtemp(prefix="bench-")
    for split, count in (("train", rows), ("test", TEST_ROWS)):
        data.write_split(data.to_table(*noise(count), CLASSES), f"{storage}/data/digits/{split}")
    open(f"{storage}/data/digits/_SUCCESS", "w").close()
    return settings.Settings(storage=storage, flip="yes", **choices)


def timed_loop(config: dict) -> dict:
    """Run the lesson's train loop unchanged, noting when it stepped and reported and what Ray did beside it."""
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
    """The CPU seconds that this worker's raylet and all other processes it started have used."""
    worker = psutil.Process()
    raylet = worker.parent()
    others = [process for process in [raylet, *raylet.children(recursive=True)] if process != worker]
    return sum(sum(process.cpu_times()[:2]) for process in others)


def fit(rows: int, epochs: int, batch: int, workers: int) -> dict:
    """Train with `fit()` in the Ray that runs, or in one that is started and counted in.

    An epoch lasts from the end of the report before it to its last step; the evaluation is not the bare loop's.
    """
    chosen = _storage_with(rows, epochs=epochs, batch_size=batch, workers=workers)
    moments = {"connect": time.time()}
    cluster.connect()
    run = trainer.build_trainer(chosen)
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


def bare_in_worker(config: dict) -> dict:
    """Run the bare loop as a train function: no pictures to fetch, no evaluation, no checkpoint, no report."""
    started, steps = time.time(), bare(**config)
    first, before = next(steps), background()
    steps = [first, *steps]
    return {"train_function": started, "steps": steps, "background": [(first, before), (steps[-1], background())]}


def limit(rows: int, epochs: int, batch: int, workers: int) -> dict:
    """Time `fit()` around the bare loop: what Ray Train's processes cost whatever one does in them."""
    cluster.connect()
    with tempfile.TemporaryDirectory() as storage:
        start = time.time()
        result = TorchTrainer(
            bare_in_worker,
            train_loop_config={"rows": rows, "epochs": epochs, "batch": batch},
            scaling_config=cluster.scaling_config(settings.Settings(workers=workers)),
            run_config=RunConfig(storage_path=storage, name="limit"),
        ).fit()
        moments = {"fit": start, "end": time.time(), "train_function": result.return_value["train_function"]}
    ends = result.return_value["steps"][:: rows // batch]
    noted = result.return_value["background"]
    return {"moments": moments, "spans": list(itertools.pairwise(ends)), "background": noted}


def ingest(rows: int, epochs: int, batch: int) -> dict:
    """Take augmented batches, normalise them as the train loop does, and do nothing more with them."""
    chosen = _storage_with(rows)
    cluster.connect()
    train_ds = data.load("train", chosen)
    dataset = trainer.build_datasets(train_ds, train_ds, flip=True)["train"]
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        taken = 0
        shuffle = {"local_shuffle_buffer_size": 4096}
        for part in dataset.iter_torch_batches(batch_size=batch, drop_last=True, **shuffle):
            taken += len(normalize_images(part["image"], [0.5] * 3, [0.25] * 3))
        seconds.append(time.perf_counter() - start)
    return {"epochs": seconds, "rows": taken}


def write(rows: int) -> dict:
    """Write Parquet with the tensor column."""
    pixels, labels = noise(rows)
    with tempfile.TemporaryDirectory() as folder:
        before, start = memory.resident(), time.perf_counter()
        data.write_split(data.to_table(pixels, labels, CLASSES), folder)
        seconds = time.perf_counter() - start
        assert sum(pq.read_metadata(entry.path).num_rows for entry in os.scandir(folder)) == rows
    return {"seconds": seconds, "megabytes": memory.peak() - before}


def folder(path: str) -> dict:
    """Turn a folder of JPEGs into Parquet, twice, with a Ray that has had ten seconds to settle."""
    cluster.connect()
    time.sleep(10)
    seconds = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as storage:
            start = time.perf_counter()
            data.prepare(settings.Settings(data=path, storage=storage))
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "again": seconds[1]}


def stream(rows: int, times: int, store_megabytes: int) -> dict:
    """Take batches from `times` as many rows through an object store that can't hold them."""
    ray.init(
        num_cpus=cluster.logical_cpus(),
        object_store_memory=store_megabytes * 10**6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    cluster.connect()  # applies the settings of the series
    chosen = _storage_with(rows)
    files = [entry.path for entry in os.scandir(chosen.path("data", "digits", "train"))]
    with tempfile.TemporaryDirectory() as copies:
        links = [os.path.join(copies, f"{n}-{os.path.basename(file)}") for n in range(times) for file in files]
        for link in links:
            os.symlink(files[links.index(link) % len(files)], link)
        train_ds = ray.data.read_parquet(links)
        dataset = trainer.build_datasets(train_ds, train_ds, flip=True)["train"]
        next(iter(dataset.iter_torch_batches(batch_size=256)))  # starts the processes
        with memory.Watch() as watch:
            start = time.perf_counter()
            taken = sum(len(part["label"]) for part in dataset.iter_torch_batches(batch_size=256))
            seconds = time.perf_counter() - start
    assert taken == rows * times
    return {"seconds": seconds, "rows": taken, "megabytes": watch.most}
