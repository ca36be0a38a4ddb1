"""Ray on a laptop or a cluster: start or join it with settings that suit it, and see what it has to give."""

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time

import joblib
import ray
from ray.data import DataContext, ExecutionResources, TaskPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from helpers import _ray_internals, settings

# Read when Ray starts: no usage report over the network, and no workers started through uv.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


class ClusterError(RuntimeError):
    """Ray can't be reached or can't give what was asked for; the message says what to do."""


def connect() -> None:
    """Join the Ray that `RAY_ADDRESS` names, or start one here, unless connected; or raise ClusterError."""
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _join(address)
        else:
            _start()
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = settings.load().logs == "verbose"
    if on_one_machine():
        # A process that watches for machines about to be taken away: nobody takes this one.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # The newer Parquet reader starts up to 32 processes for file footers: on a small machine slower than reading.
        context.use_datasource_v2 = False
        # No more data tasks at a time than there are cores; the other tickets are for training.
        context.execution_options.resource_limits = ExecutionResources(cpu=cores())


def disconnect() -> None:
    """Leave Ray; what `connect()` started on this machine ends with all its processes."""
    ray.shutdown()


@contextlib.contextmanager
def shared_ray():
    """Keep one local Ray running for all notebooks started inside this context; they find it by `RAY_ADDRESS`."""
    if os.environ.get("RAY_ADDRESS"):  # that cluster is used, and nothing is started
        yield
        return
    connect()
    _ray_internals.prestart_workers(scaling_config().num_workers)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        disconnect()


def cores() -> int:
    """The CPU cores that this process may use, container limits included."""
    return joblib.cpu_count()


def logical_cpus() -> int:
    """How many CPUs a local Ray is told it has: tickets for scheduling, not hardware."""
    return 3 * max(2, cores())  # one set for training workers, one for their data tasks, one for another open lesson


def alive_nodes() -> list[dict]:
    """The nodes of the Ray in use that are alive, as `ray.nodes()` lists them."""
    return [node for node in ray.nodes() if node["Alive"]]


def on_one_machine() -> bool:
    """Whether the Ray in use consists of this machine alone, however many nodes run on it."""
    return {node["NodeManagerHostname"] for node in alive_nodes()} == {socket.gethostname()}


def scaling_config(cfg: settings.Settings | None = None):
    """Return a ScalingConfig for training that suits what Ray has, or what the learner chose."""
    from ray.train import ScalingConfig  # here, since Ray Data's processes import this module and start sooner

    cfg = cfg or settings.load()
    # One worker per GPU. On a cluster without: one per machine, which leaves a CPU to data tasks. On one machine: two.
    if gpus := int(ray.cluster_resources().get("GPU", 0)):
        return ScalingConfig(num_workers=cfg.workers or gpus, use_gpu=True)
    if not on_one_machine():
        if cfg.workers:
            return ScalingConfig(num_workers=cfg.workers)
        cpus = [int(node["Resources"]["CPU"]) for node in alive_nodes() if node["Resources"].get("CPU")]
        resources = {"CPU": max(1, min(cpus) - 1)}
        return ScalingConfig(num_workers=len(cpus), resources_per_worker=resources, placement_strategy="SPREAD")
    workers = cfg.workers or 2
    return ScalingConfig(num_workers=workers, resources_per_worker={"CPU": max(1, cores() // workers)})


def actor_pool(cfg: settings.Settings | None = None) -> tuple[int, dict]:
    """Return how many inference actors suit this Ray, and one's resources for `map_batches`; or raise ClusterError."""
    scaling = scaling_config(cfg)
    require_resources(scaling)
    if scaling.use_gpu:
        return scaling.num_workers, {"num_gpus": 1}
    return scaling.num_workers, {"num_cpus": (scaling.resources_per_worker or {}).get("CPU", 1)}


def worker_counts() -> list[int]:
    """Return the numbers of training workers to compare: one, and one per GPU or, without GPUs, at least two."""
    return sorted({1, int(ray.cluster_resources().get("GPU", 0)) or max(2, scaling_config().num_workers)})


@contextlib.contextmanager
def all_cores_at_once():
    """Let a dataset made inside this context use all cores from its first moment; gives its `compute` argument."""
    # Ray Data asks an actor how much it may use, looks once a second, and until then runs one task at a time.
    context = DataContext.get_current()
    if not on_one_machine():
        yield None
        return
    context.op_resource_reservation_enabled = False
    try:
        yield TaskPoolStrategy(size=cores())
    finally:
        context.op_resource_reservation_enabled = True


def require_resources(scaling, seconds: float = 10) -> None:
    """Raise ClusterError when Ray can't give a ScalingConfig, and a CPU for data; `fit()` itself would wait forever."""
    workers, cpus = scaling.num_workers, ray.cluster_resources().get("CPU", 0)
    if 0 <= cpus - scaling.total_resources.get("CPU", 0) < 1:
        what = f"{workers} workers need all {cpus:g} CPU of this Ray and leave none for the tasks that read their data"
        raise ClusterError(f"{what}: set TUTORIAL_WORKERS to a smaller number, or give each worker fewer CPUs.")
    count_free(scaling.total_resources, f"{workers} workers need", seconds)


def count_free(needs: dict[str, float], who_needs: str, seconds: float = 10) -> int:
    """Return how often Ray can give `needs`, such as `{"CPU": 2}`; if not once in `seconds`, raise ClusterError."""
    # `who_needs`, such as `2 workers need`, begins the error's sentence.
    needs = {resource: amount for resource, amount in needs.items() if amount}
    total = ray.cluster_resources()
    for resource, amount in needs.items():
        if amount > total.get(resource, 0):
            what = f"{who_needs} {amount:g} {resource}, and this Ray has {total.get(resource, 0):g}"
            raise ClusterError(f"{what}: set TUTORIAL_WORKERS to a smaller number, or add machines to the cluster.")
    deadline = time.monotonic() + seconds
    while True:
        _ray_internals.remove_orphaned_placement_groups()
        free = ray.available_resources()
        times = {resource: int(free.get(resource, 0) / amount) for resource, amount in needs.items()}
        scarce = min(times, key=times.get)
        if times[scarce]:
            return times[scarce]
        if time.monotonic() > deadline:
            what = f"{who_needs} {needs[scarce]:g} {scarce}, and only {free.get(scarce, 0):g} are free"
            raise ClusterError(f"{what}: let the other lesson finish or shut down its kernel.")
        time.sleep(0.5)


def require_shared_storage(storage: str) -> None:
    """Raise ClusterError when a machine can't see the storage folder; training would fail at its first checkpoint."""
    if "://" in storage or on_one_machine():
        return
    os.makedirs(storage, exist_ok=True)
    exists = ray.remote(num_cpus=0)(os.path.exists)
    with tempfile.NamedTemporaryFile(dir=storage, prefix=".seen-by-all-") as file:
        for node in alive_nodes():
            on_node = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            if not ray.get(exists.options(scheduling_strategy=on_node).remote(file.name)):
                what = f"The machine {node['NodeManagerHostname']} can't see the storage folder {storage}"
                remedy = "to a folder that all machines share, or to a URI such as s3://bucket/path"
                raise ClusterError(f"{what}: set TUTORIAL_STORAGE {remedy}.")


@contextlib.contextmanager
def suppress_ray_logs():
    """Keep what Ray writes while it starts or stops out of the notebook, unless the learner chose `logs="verbose"`."""
    verbose = settings.load().logs == "verbose"
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    if verbose:
        yield
        return
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # Ray's compiled part writes there, such as a warning that there is no internet
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _start() -> None:
    try:
        with _ray_internals.environment(_ray_internals.NO_DASHBOARD):
            _init_ray(address="local", num_cpus=logical_cpus(), include_dashboard=False)
    except OSError as error:
        if "path length" not in str(error):
            raise
        what = f"Ray's sockets don't fit into the long path of the temporary folder {tempfile.gettempdir()}"
        raise ClusterError(f"{what}: set RAY_TMPDIR to a short one, such as /tmp.") from error
    _ray_internals.prestart_workers()


def _join(address: str) -> None:
    if "://" not in address and ":" not in address and address not in ("auto", "local"):
        address += ":6379"  # the port that `ray start --head` takes by default
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        _init_ray(address=address)
    except OSError as error:  # a ConnectionError, too
        remedy = "start it there, or unset RAY_ADDRESS to use this machine alone"
        raise ClusterError(f"No Ray answers at RAY_ADDRESS={address}: {remedy}.") from error
    if not on_one_machine():  # the other machines have no copy of `helpers`: connect again and send it along
        ray.shutdown()
        _init_ray(address=address, runtime_env={"py_modules": [sys.modules["helpers"]]})


def _init_ray(**arguments) -> None:
    verbose = settings.load().logs == "verbose"
    level = logging.INFO if verbose else logging.ERROR
    with suppress_ray_logs():
        ray.init(log_to_driver=verbose, logging_level=level, **arguments)
    _ray_internals.show_worker_logs(verbose)
    logging.getLogger("ray.data").setLevel(level)
