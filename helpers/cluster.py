"""Ray on a laptop or a cluster: start or join it with settings that suit it, and see what it has to give."""

import contextlib
import importlib.metadata
import logging
import os
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable

import joblib
import pyarrow.fs
import ray
from ray.data import DataContext, ExecutionResources
from ray.util import placement_group_table
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
        # No more data tasks at a time than there are cores; the other tickets are for training.
        context.execution_options.resource_limits = ExecutionResources(cpu=cores())
    else:
        _require_same_torch()
    if on_one_machine() or ray.cluster_resources().get("CPU", 0) < 64:
        # The newer Parquet reader starts up to 32 processes for file footers: with few cores slower than reading.
        context.use_datasource_v2 = False
    require_shared_storage(settings.load().storage)


def disconnect() -> None:
    """Leave Ray; what `connect()` started on this machine ends with all its processes."""
    ray.shutdown()


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
    """Return how many inference actors suit this Ray, two or more, and one's resources; or raise ClusterError."""
    scaling = scaling_config(cfg)
    require_resources(scaling)
    size = max(2, scaling.num_workers)
    if scaling.use_gpu:
        return size, {"num_gpus": scaling.num_workers / size}  # two share a single GPU
    cpus = (scaling.resources_per_worker or {}).get("CPU", 1)
    # Ray Data may use as many CPUs as there are cores: half for actors, or nothing is written before they are done.
    return size, {"num_cpus": max(1, cores() // size) / 2 if on_one_machine() else cpus}


def worker_counts() -> list[int]:
    """Return the numbers of workers to compare: 1, and that of `scaling_config`, or 2; or raise ClusterError."""
    scaling = scaling_config()
    require_resources(scaling)
    return sorted({1, scaling.num_workers if scaling.use_gpu else max(2, scaling.num_workers)})


def require_resources(scaling, seconds: float = 10) -> None:
    """Raise ClusterError when Ray can't give a ScalingConfig, and a CPU for data; `fit()` itself would wait forever."""
    workers, total = scaling.num_workers, ray.cluster_resources()
    cpus = total.get("CPU", 0)
    if 0 <= cpus - scaling.total_resources.get("CPU", 0) < 1:
        what = f"{workers} workers need all {cpus:g} CPU of this Ray and leave none for the tasks that read their data"
        raise ClusterError(f"{what}: set TUTORIAL_WORKERS to a smaller number, or give each worker fewer CPUs.")
    for resource, amount in scaling.total_resources.items():
        if amount > total.get(resource, 0):
            what = f"{workers} workers need {amount:g} {resource}, and this Ray has {total.get(resource, 0):g}"
            raise ClusterError(f"{what}: set TUTORIAL_WORKERS to a smaller number, or add machines to the cluster.")
    deadline = time.monotonic() + seconds
    while True:
        _ray_internals.remove_orphaned_placement_groups()
        free, needed = ray.available_resources(), dict(scaling.total_resources)
        # What other trainings hold must leave a CPU to data tasks, or all of them might wait for each other.
        groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        held = sum(bundle.get("CPU", 0) for group in groups for bundle in group["bundles"].values())
        if held and cpus - held < needed.get("CPU", 0) + 1:
            free["CPU"], needed["CPU"] = cpus - held, needed.get("CPU", 0) + 1
        scarce = [name for name, amount in needed.items() if amount > free.get(name, 0)]
        if not scarce:
            return
        if time.monotonic() > deadline:
            tasks = " and the tasks that read their data" if needed != scaling.total_resources else ""
            amount, left = needed[scarce[0]], free.get(scarce[0], 0)
            what = f"{workers} workers{tasks} need {amount:g} {scarce[0]}, and only {left:g} are free"
            raise ClusterError(f"{what}: let the other lesson finish or shut down its kernel.")
        time.sleep(0.5)


def require_shared_storage(storage: str) -> None:
    """Raise ClusterError unless every machine can write to the storage, and sees there what this one has written."""
    if "://" not in storage and on_one_machine():
        return  # `settings.require_writable` looks at a folder of this machine
    mark = f".seen-by-all-{uuid.uuid4().hex}"

    def find_trouble(first: bool = False) -> str:  # defined here, so that it is sent to machines without `helpers`
        try:
            filesystem, folder = pyarrow.fs.FileSystem.from_uri(storage)
            if first:
                filesystem.create_dir(folder)
            elif not filesystem.get_file_info(f"{folder}/{mark}").is_file:
                remedy = "set TUTORIAL_STORAGE to one that all machines share, or to a URI such as s3://bucket/path"
                return f"can't see the storage folder {storage}: {remedy}"
            with filesystem.open_output_stream(f"{folder}/{mark}") as stream:
                stream.write(b"1")
        except Exception as error:
            remedy = "change its permissions, or set the variables that hold credentials, such as AWS_*"
            return f"can't write ({str(error).splitlines()[0]}) to the storage {storage}: {remedy}"
        return ""

    troubles = {socket.gethostname(): find_trouble(first=True)}
    if not any(troubles.values()):
        try:
            troubles = _ask_machines(find_trouble)
        finally:
            filesystem, folder = pyarrow.fs.FileSystem.from_uri(storage)
            filesystem.delete_file(f"{folder}/{mark}")
    for machine, trouble in troubles.items():
        if trouble:
            raise ClusterError(settings.hide_secret(f"The machine {machine} {trouble}."))


def _require_same_torch() -> None:
    def version() -> str:
        return next((one.version for one in importlib.metadata.distributions(name="torch")), "none").partition("+")[0]

    for machine, there in _ask_machines(version).items():
        if there != version():
            what = f"The machine {machine} has torch {there}, and this one {version()}"
            raise ClusterError(f"{what}: install the same version, best that in constraints.txt.")


def _ask_machines(question: Callable, seconds: float = 30) -> dict:
    """Return what `question` returns on each machine, by name; or raise ClusterError where nothing answers in time."""
    task, asked = ray.remote(num_cpus=0)(question), {}
    for node in alive_nodes():
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        asked[node["NodeManagerHostname"]] = task.options(scheduling_strategy=there).remote()
    for machine, answer in asked.items():
        try:
            asked[machine] = ray.get(answer, timeout=seconds)
        except ray.exceptions.RayError as error:
            what = f"The machine {machine} belongs to this Ray and does not answer"
            raise ClusterError(f"{what}: repair its network, or restart Ray there.") from error
    return asked


@contextlib.contextmanager
def suppress_ray_logs():
    """Keep what Ray logs or writes to stderr out of the notebook, unless the learner chose `logs="verbose"`."""
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
        _ray_internals.use_token()
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        _init_ray(address=address)
    except (OSError, ray.exceptions.AuthenticationError) as error:  # a ConnectionError, too
        what = f"No Ray answers at RAY_ADDRESS={address}"
        remedy = "start it there, or unset RAY_ADDRESS to use this machine alone"
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            what = f"The Ray at RAY_ADDRESS={address} wants a token, and this notebook has none or another"
            remedy = "copy ~/.ray/auth_token from the machine that started it"
        raise ClusterError(f"{what}: {remedy}.") from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        there, here = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))[:2]
        what = "The cluster runs Ray {} on Python {}, and this notebook Ray {} on Python {}".format(*there, *here)
        raise ClusterError(f"{what}: install the same versions, best those in constraints.txt.") from error
    if on_one_machine():
        return

    def use_rays_network() -> None:  # defined here, so that no worker process must import this module for it
        # PyTorch's gloo listens where the machine's own name leads, often to 127.0.1.1: let it take Ray's network.
        import psutil

        for name, addresses in psutil.net_if_addrs().items():
            if ray.util.get_node_ip_address() in [one.address for one in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)

    ray.shutdown()  # connect again, and send along what the other machines lack
    credentials = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_", "AZURE_"))}
    sent = {"py_modules": [sys.modules["helpers"]], "env_vars": credentials}
    _init_ray(address=address, runtime_env=sent | {"worker_process_setup_hook": use_rays_network})


def _init_ray(**arguments) -> None:
    verbose = settings.load().logs == "verbose"
    level = logging.INFO if verbose else logging.ERROR
    with suppress_ray_logs():
        ray.init(log_to_driver=verbose, logging_level=level, **arguments)
    _ray_internals.show_worker_logs(verbose)
    logging.getLogger("ray.data").setLevel(level)
