"""Several Ray nodes on this one machine: each a raylet of its own, as `ray start` runs one on every machine."""

import contextlib
import os
from unittest import mock

import psutil
import ray
import ray.data
from ray.cluster_utils import Cluster

from helpers import cluster

OBJECT_STORE_BYTES = 80_000_000  # bytes of object store a node: little, so that a lesson can outgrow it
# Ray Data's blocks, 128 MiB by default, would not fit: one or two filled a store, and Ray wrote them to the disk, which
# it refuses when the disk is 95 % full. Of 2, 4 and 8 MB this one kept the stores below a quarter, nearly as fast as 8.
BLOCK_BYTES = 4_000_000


class Nodes:
    """A head without CPUs, to which this process connects, and nodes that do the work and can be killed.

    What this process was connected to before is left; `stop()` ends all nodes, and `cluster.connect()` leads back.
    Until then Ray Data makes blocks that suit the small object stores.
    """

    _running: "Nodes | None" = None

    def __init__(self, count: int):
        if Nodes._running:  # a cell that was interrupted, or run twice
            Nodes._running.stop()
        cluster.disconnect()
        self._address_before = os.environ.get("RAY_ADDRESS")
        # Ray notices a dead node within two seconds instead of half a minute.
        impatient = {
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 2,
        }
        with cluster.quiet(), cluster.without_dashboard(), _unannounced():
            self._cluster = Cluster(
                initialize_head=True,
                shutdown_at_exit=True,
                head_node_args={
                    "num_cpus": 0,
                    "object_store_memory": OBJECT_STORE_BYTES,
                    "include_dashboard": False,
                    "_system_config": {**impatient, "worker_maximum_startup_concurrency": 64},
                },
            )
            # Enough for two training workers and the data tasks that feed them: one node can take over from another.
            node = {"num_cpus": 4, "object_store_memory": OBJECT_STORE_BYTES}
            for _ in range(count):
                self._cluster.add_node(**node)
        Nodes._running = self
        os.environ["RAY_ADDRESS"] = self._cluster.address
        cluster.connect()
        context = ray.data.DataContext.get_current()
        self._block_bytes_before, context.target_max_block_size = context.target_max_block_size, BLOCK_BYTES

    def stop(self) -> None:
        """Disconnect from the nodes and end them all."""
        ray.data.DataContext.get_current().target_max_block_size = self._block_bytes_before
        cluster.disconnect()
        with cluster.quiet(), _unannounced():
            self._cluster.shutdown()
        del os.environ["RAY_ADDRESS"]
        if self._address_before is not None:
            os.environ["RAY_ADDRESS"] = self._address_before
        Nodes._running = None


@contextlib.contextmanager
def _unannounced():
    """Leave the file alone that names the Ray last started by `ray start`: `Cluster` would write its own address there.

    A lesson that is killed would leave the address of a dead Ray, which others then wait for.
    """
    with (
        mock.patch("ray._private.utils.write_ray_address"),
        mock.patch("ray._common.utils.reset_ray_address"),
    ):
        yield


def lose_power() -> None:
    """End at once, from one of its workers, a node and all it started, as when its machine loses power."""
    worker = psutil.Process()
    raylet = worker.parent()  # first of all, or it would start others in their place
    for process in [raylet, *raylet.children(recursive=True)]:
        if process != worker:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    worker.kill()


def memory_in_use() -> tuple[float, float]:
    """What lies in the object stores of all nodes, and what this process and Ray's processes at work hold, in MB.

    A process that waits for its first task, or its next, is left out: it holds Ray's modules and no pictures.
    """
    name = "object_store_memory"
    stores = ray.cluster_resources()[name] - ray.available_resources().get(name, 0)
    processes = 0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title, memory = "".join((process.info["cmdline"] or [])[:1]), process.info["memory_info"]
        at_work = title.startswith("ray::") and "IDLE" not in title
        if memory and (at_work or process.pid == os.getpid()):
            # What is shared lies in the object store; not every system says how much that is.
            processes += memory.rss - getattr(memory, "shared", 0)
    return stores / 1e6, processes / 1e6
