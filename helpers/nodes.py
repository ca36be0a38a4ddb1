"""Several Ray nodes on this one machine: each a raylet of its own, as `ray start` runs one on every machine."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading

import psutil
import ray
import ray.data
from ray.cluster_utils import Cluster

from helpers import _ray_internals, cluster

NODE_CPUS = 4  # enough for two training workers and their data tasks: one node can take over from another
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
        self._cluster, self._joined, self._stopped = Cluster(shutdown_at_exit=True), [], threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._settings = contextlib.ExitStack()
        # `Cluster` announces its address in Ray's temporary folder. In a folder of its own, no other Ray waits for it.
        self._folder = make_folder()
        LocalCluster._running = self  # from here on, the next one stops what an interrupted start has left
        # All nodes compute on the cores of this machine, so their workers use fewer threads than they have CPUs.
        threads = str(max(1, cluster.cores() // 4))
        here = {"RAY_TMPDIR": self._folder, "OMP_NUM_THREADS": threads}
        self._settings.enter_context(_ray_internals.environment(here))
        started_with = {**_ray_internals.QUICK_HEALTH_CHECKS, **_ray_internals.NO_DASHBOARD}
        with cluster.suppress_ray_logs(), _ray_internals.environment(started_with):
            _ray_internals.use_token(create=True)
            head = {"include_dashboard": False, "dashboard_agent_listen_port": 0}  # another Ray may have the usual port
            self._cluster.add_node(num_cpus=0, object_store_memory=OBJECT_STORE_BYTES, **head)
            for _ in range(num_nodes):
                self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=OBJECT_STORE_BYTES)
        self._settings.enter_context(_ray_internals.environment({"RAY_ADDRESS": self._cluster.address}))
        cluster.connect()
        context = ray.data.DataContext.get_current()
        self._settings.callback(setattr, context, "target_max_block_size", context.target_max_block_size)
        context.target_max_block_size = BLOCK_BYTES
        self._watcher.start()

    def add_node(self) -> None:
        """Let one more node join, as on another machine, and return at once; from any thread."""
        resources = [f"--num-cpus={NODE_CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self._cluster.address}", "--block"]
        nowhere = subprocess.DEVNULL
        self._joined.append(subprocess.Popen(start + resources, stdin=nowhere, stdout=nowhere, stderr=nowhere))

    def _watch(self) -> None:
        """Let elastic training know of a node that died or joined within a second."""
        while not self._stopped.wait(1):
            if ray.is_initialized():  # or asking would connect again
                _ray_internals.refresh_reserved_resources()

    def stop(self) -> None:
        """Disconnect from the nodes and end them all; `cluster.connect()` then leads back to the usual Ray."""
        self._stopped.set()
        if self._watcher.is_alive():
            self._watcher.join()
        cluster.disconnect()
        for command in self._joined:
            if command.poll() is None:
                kill_node(psutil.Process(command.pid))
            command.wait()
        with cluster.suppress_ray_logs():
            self._cluster.shutdown()
        self._settings.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        LocalCluster._running = None


def make_folder() -> str:
    """Make a temporary folder for a Ray of its own, with a path that is short enough for Ray's sockets."""
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp" if sys.platform == "darwin" else None)


def kill_node(raylet: psutil.Process | None = None) -> None:
    """End at once the node of `raylet`, by default this worker's own, and all it started, as if it lost power."""
    me = psutil.Process()
    node = raylet or me.parent()
    processes = [node, *node.children(recursive=True)] if node.is_running() else []
    for process in processes:  # the raylet first, or it would replace the others
        if process != me:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if not raylet:
        me.kill()
