"""Several Ray nodes on this one machine: each a raylet of its own, as `ray start` runs one on every machine."""

import contextlib
import os
import shutil
import sys
import tempfile

import psutil
import ray
import ray.data
from ray.cluster_utils import Cluster

from helpers import _ray_internals, cluster

OBJECT_STORE_BYTES = 80_000_000  # bytes of object store per node: little, so that a lesson can outgrow it
# One or two of Ray Data's blocks of 128 MiB would fill a store. Of 2, 4 and 8 MB this one kept it below a quarter.
BLOCK_BYTES = 4_000_000


class LocalCluster:
    """A head without CPUs, to which this process connects, and nodes that do the work and can be killed."""

    _running: "LocalCluster | None" = None

    def __init__(self, num_nodes: int):
        if LocalCluster._running:  # a cell that was interrupted, or run twice
            LocalCluster._running.stop()
        cluster.disconnect()
        # `Cluster` announces its address in Ray's temporary folder. In a folder of its own, no other Ray waits for it.
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if sys.platform == "darwin" else None)
        self._settings = contextlib.ExitStack()
        self._settings.enter_context(_ray_internals.environment({"RAY_TMPDIR": self._folder}))
        started_with = {**_ray_internals.QUICK_HEALTH_CHECKS, **_ray_internals.NO_DASHBOARD}
        with cluster.suppress_ray_logs(), _ray_internals.environment(started_with):
            self._cluster = Cluster(
                initialize_head=True,
                shutdown_at_exit=True,
                head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES},
            )
            LocalCluster._running = self
            for _ in range(num_nodes):
                # Enough for two training workers and their data tasks: one node can take over from another.
                self._cluster.add_node(num_cpus=4, object_store_memory=OBJECT_STORE_BYTES)
        self._settings.enter_context(_ray_internals.environment({"RAY_ADDRESS": self._cluster.address}))
        cluster.connect()
        context = ray.data.DataContext.get_current()
        self._settings.callback(setattr, context, "target_max_block_size", context.target_max_block_size)
        context.target_max_block_size = BLOCK_BYTES

    def stop(self) -> None:
        """Disconnect from the nodes and end them all; `cluster.connect()` then leads back to the usual Ray."""
        cluster.disconnect()
        with cluster.suppress_ray_logs():
            self._cluster.shutdown()
        self._settings.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        LocalCluster._running = None


def kill_node() -> None:
    """End at once, from one of its workers, a node and everything it started, as when its machine loses power."""
    worker = psutil.Process()
    raylet = worker.parent()  # killed first, or it would start other processes in their place
    for process in [raylet, *raylet.children(recursive=True)]:
        if process != worker:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    worker.kill()


def memory_in_use() -> tuple[float, float]:
    """Return what all nodes' object stores hold, and this process and Ray's at work (idle ones hold none), in MB."""
    name = "object_store_memory"
    stores = ray.cluster_resources()[name] - ray.available_resources().get(name, 0)
    processes = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title, memory = "".join((process.info["cmdline"] or [])[:1]), process.info["memory_info"]
        if memory and (_ray_internals.is_at_work(title) or process.pid == os.getpid()):
            processes += memory.rss - getattr(memory, "shared", 0)  # that is in the stores; not all systems say it
    return stores / 1e6, processes / 1e6
