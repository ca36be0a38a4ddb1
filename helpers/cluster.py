"""Ray on a laptop or a cluster: start or join it with settings that suit it, and see what it has to give."""

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from typing import TYPE_CHECKING

# Read when Ray is imported or started: no usage report over the network, no workers started through uv, and no wait
# of up to two seconds before Ray Train notices what its workers report.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# The processes that a local Ray starts in stock import Ray Data while nobody waits for them.
os.environ.setdefault("RAY_preload_python_modules", "ray.data")

import joblib
import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.data import DataContext, ExecutionResources, TaskPoolStrategy
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from helpers import settings, stock

if TYPE_CHECKING:  # Ray Data's processes import this module and do without Ray Train, which takes a second to import
    from ray.train import ScalingConfig


_job_with_readers: str | None = None


class ClusterError(RuntimeError):
    """Ray can't be reached or can't give what was asked for; the message says what to do."""


def connect() -> None:
    """Join the Ray that `RAY_ADDRESS` names, or start one on this machine; do nothing when already connected.

    Raises:
        ClusterError: nothing answers at `RAY_ADDRESS`.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _join(address)
        else:
            with without_dashboard():
                _quietly(
                    address="local",
                    num_cpus=logical_cpus(),
                    include_dashboard=False,
                    _system_config={
                        # Ray would warn in the notebook about the processes that any training starts.
                        "worker_maximum_startup_concurrency": 64,
                        # And it would start a process for each of the CPUs that it was told of, needed or not.
                        "prestart_worker_first_driver": False,
                    },
                )
            stock.order_for_data()
    _configure()


def disconnect() -> None:
    """Leave Ray; what `connect()` started on this machine ends with all its processes."""
    ray.shutdown()


@contextlib.contextmanager
def without_dashboard():
    """Let the processes of a Ray that is started inside this context know that it has no dashboard to ask.

    They would look for one, each time anew, and might find that of another Ray on this machine, or wait for one that
    is dead: with such a Ray's address left in Ray's temporary folder, each `fit()` ended 12 seconds later.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = "http://.no-dashboard"  # no name of a host, so that asking fails at once, behind a proxy too
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def shared():
    """Keep one local Ray running for all notebooks started inside this context; they find it by `RAY_ADDRESS`.

    A cold start costs each lesson seconds; joining a Ray that runs takes a fraction of one. With `RAY_ADDRESS` set,
    that cluster is used and nothing is started.
    """
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    connect()
    stock.order_for_training(scaling_config().num_workers)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        disconnect()


def replace_used(workers: int) -> None:
    """Let the Ray that all notebooks share start processes in place of those that a `fit()` has used up."""
    global _job_with_readers
    if os.environ.get("RAY_ADDRESS") and len(alive_nodes()) == 1 and on_one_machine():
        job = ray.get_runtime_context().get_job_id()
        # Those that read for a notebook go on to do so for its next `fit()`: they are used up once.
        stock.order_for_training(workers, readers=0 if job == _job_with_readers else stock.READERS)
        _job_with_readers = job


def cores() -> int:
    """The processor cores that this process may use, container limits included."""
    return joblib.cpu_count()


def logical_cpus() -> int:
    """How many CPUs a local Ray is told it has.

    Ray counts CPUs as tickets, not as silicon. One set is for the training workers, which would otherwise leave
    none for the data tasks that feed them, one for those, and one for a second lesson that is open at the same time.
    """
    return 3 * max(2, cores())


def alive_nodes() -> list[dict]:
    """The machines of the Ray in use that answer."""
    return [node for node in ray.nodes() if node["Alive"]]


def on_one_machine() -> bool:
    """Whether the Ray in use consists of this machine alone, however many nodes run on it."""
    return {node["NodeManagerHostname"] for node in alive_nodes()} == {socket.gethostname()}


def scaling_config(chosen: settings.Settings | None = None) -> "ScalingConfig":
    """Return workers and resources for training that suit what Ray has, or what the reader chose.

    With GPUs: one worker a GPU. On a cluster without: one on each machine, with all its CPUs but one, which reads. On a
    single machine without: one for every two cores, four at most, since a worker alone on one core spends more on
    communicating than a second one gains.
    """
    from ray.train import ScalingConfig

    chosen = chosen or settings.load()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        return ScalingConfig(num_workers=chosen.workers or gpus, use_gpu=True)
    if not on_one_machine():
        if chosen.workers:
            return ScalingConfig(num_workers=chosen.workers)
        cpus = [int(node["Resources"]["CPU"]) for node in alive_nodes() if node["Resources"].get("CPU")]
        each = {"CPU": max(1, min(cpus) - 1)}
        return ScalingConfig(num_workers=len(cpus), resources_per_worker=each, placement_strategy="SPREAD")
    workers = chosen.workers or min(4, max(1, cores() // 2))
    return ScalingConfig(num_workers=workers, resources_per_worker={"CPU": max(1, cores() // workers)})


def actor_pool(chosen: settings.Settings | None = None) -> tuple[int, dict]:
    """How many actors are to answer side by side, and what each gets: as many as training would have workers.

    Returns:
        The number of actors, and the resources of one, as `map_batches` and an actor's `options` take them.

    Raises:
        ClusterError: Ray can't give them.
    """
    scaling = scaling_config(chosen)
    require(scaling)
    if scaling.use_gpu:
        return scaling.num_workers, {"num_gpus": 1}
    return scaling.num_workers, {"num_cpus": (scaling.resources_per_worker or {}).get("CPU", 1)}


def worker_counts() -> list[int]:
    """One training worker, and as many as there are GPUs; without GPUs, as many as suit this Ray, two at least."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return sorted({1, gpus or max(2, scaling_config().num_workers)})


@contextlib.contextmanager
def all_cores_at_once():
    """Let a dataset made inside this context use all cores from its first moment; gives its `compute` argument.

    Ray Data asks an actor how much of the cluster it may use, and looks at the answer once a second: until then it
    runs one task at a time, which is most of the time that a short job takes. On a cluster nothing is changed.
    """
    context = DataContext.get_current()
    if not on_one_machine():
        yield None
        return
    context.op_resource_reservation_enabled = False
    try:
        yield TaskPoolStrategy(size=cores())
    finally:
        context.op_resource_reservation_enabled = True


def require(scaling: "ScalingConfig", seconds: float = 10) -> None:
    """Raise at once when Ray can't give what `scaling` asks for; `fit()` itself would wait for ever.

    Args:
        scaling: the workers and resources that training will ask for.
        seconds: how long to wait for resources that exist but are in use.

    Raises:
        ClusterError: there are too few CPUs or GPUs, or others hold them.
    """
    wanted = scaling.total_resources
    for resource, amount in wanted.items():
        total = ray.cluster_resources().get(resource, 0)
        if amount > total:
            raise ClusterError(
                f"{scaling.num_workers} workers need {amount:g} {resource}, and this Ray has {total:g}: "
                "set TUTORIAL_WORKERS to a smaller number, or add machines to the cluster."
            )
    deadline = time.monotonic() + seconds
    while True:
        remove_orphaned_placement_groups()
        free = ray.available_resources()
        busy = [name for name, amount in wanted.items() if amount > free.get(name, 0)]
        if not busy:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{scaling.num_workers} workers need {wanted[busy[0]]:g} {busy[0]}, and only "
                f"{free.get(busy[0], 0):g} are free: let the other lesson finish or shut down its kernel."
            )
        time.sleep(0.5)


def require_shared(storage: str) -> None:
    """Raise when another machine of the cluster can't see the storage folder: training would fail at its first
    checkpoint, after all the work of an epoch.

    Raises:
        ClusterError: names the machine and the remedy.
    """
    if "://" in storage or on_one_machine():
        return
    os.makedirs(storage, exist_ok=True)
    look = ray.remote(num_cpus=0)(os.path.exists)
    with tempfile.NamedTemporaryFile(dir=storage, prefix=".seen-by-all-") as token:
        for node in alive_nodes():
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            if not ray.get(look.options(scheduling_strategy=there).remote(token.name)):
                raise ClusterError(
                    f"The machine {node['NodeManagerHostname']} can't see the storage folder {storage}: set "
                    "TUTORIAL_STORAGE to a folder that all machines share, or to a URI such as s3://bucket/path."
                )


def remove_orphaned_placement_groups() -> None:
    """Give back what is reserved for training runs of this notebook whose controller process was ended by force.

    So Tune ends a trial that it stops. The process that Ray Train has for this case asks the dashboard, and a local
    Ray here runs without one.
    """
    mine = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for record in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        by_an_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        orphaned = group.creator_job_id == mine and by_an_actor and group.creator_actor_dead and not group.is_detached
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _join(address: str) -> None:
    try:
        _knock(address)
        _quietly(address=address)
    except OSError as error:  # a ConnectionError, too
        raise ClusterError(
            f"No Ray answers at RAY_ADDRESS={address}: start it there, or unset RAY_ADDRESS to use this machine alone."
        ) from error
    if not on_one_machine():
        # The other machines have no copy of `helpers`: connect anew and send it along.
        ray.shutdown()
        _quietly(address=address, runtime_env={"py_modules": [sys.modules["helpers"]]})


def _knock(address: str, seconds: float = 5) -> None:
    """Raise OSError when nobody listens at `address`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


def _quietly(**arguments) -> None:
    """Start or join Ray, with its logs only if the reader wants them."""
    with quiet() as level:
        ray.init(log_to_driver=level < logging.ERROR, logging_level=level, **arguments)
    # The switch that Ray's debugger uses, too: `log_to_driver` alone lets long messages about workers through.
    ray._private.worker._worker_logs_enabled = level < logging.ERROR
    logging.getLogger("ray.data").setLevel(level)


@contextlib.contextmanager
def quiet():
    """Keep what Ray writes while it starts or stops out of the notebook, unless the reader chose `logs="verbose"`."""
    verbose = settings.load().logs == "verbose"
    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    with contextlib.nullcontext() if verbose else _no_stderr():
        yield level


@contextlib.contextmanager
def _no_stderr():
    """Drop what Ray's compiled part writes while it starts, such as a warning that there is no internet."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _configure() -> None:
    context = DataContext.get_current()
    verbose = settings.load().logs == "verbose"
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    if on_one_machine():
        # A process that watches for machines about to be taken away: nobody takes this one.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # The newer Parquet reader starts up to 32 processes that read file footers, which takes a small machine
        # several times as long as the reading.
        context.use_datasource_v2 = False
        # No more data tasks at a time than there are cores; the other tickets are for training.
        context.execution_options.resource_limits = ExecutionResources(cpu=cores())
