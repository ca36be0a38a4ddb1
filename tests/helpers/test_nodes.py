"""Several nodes on one machine leave nothing behind. Lessons 09 and 11 assert that training survives their death."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import ray

from helpers import cluster, nodes
from support import ray_processes, wait_for

pytestmark = pytest.mark.usefixtures("shared_ray")


def in_another_process(function):
    """Call `function` elsewhere: the Ray that all tests share belongs to this process and would end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as another:
        return another.submit(function).result()


def test_kill_node_that_is_gone_already_does_nothing():
    command = subprocess.Popen([sys.executable, "-c", ""])
    node = psutil.Process(command.pid)
    command.wait()
    nodes.kill_node(node)


def state():
    """Return what a lesson would notice: environment variables, and the size of Ray Data's blocks in bytes."""
    return dict(os.environ), ray.data.DataContext.get_current().target_max_block_size


def start_two_local_clusters():
    cluster.connect()
    before, others = state(), ray_processes()
    nodes.LocalCluster(1).add_node()
    wait_for(lambda: len(cluster.alive_nodes()) == 3, "the added node did not join")
    first = ray_processes() - others
    assert {process.environ()["RAY_AUTH_MODE"] for process in first if process.name() == "raylet"} == {"token"}
    second = nodes.LocalCluster(1)  # a cell that was run twice
    wait_for(lambda: not first & ray_processes(), "the first cluster is still there")
    capacity = ray.cluster_resources()
    second.stop()
    wait_for(lambda: ray_processes() <= others, "the second cluster is still there")
    cluster.connect()
    return before, state(), len(first), capacity, ray.cluster_resources()


def interrupt_a_start():
    cluster.connect()
    before, others = state(), ray_processes()
    original = nodes.Cluster.add_node

    def be_interrupted(self, **arguments):
        if self.head_node:
            raise KeyboardInterrupt
        return original(self, **arguments)

    nodes.Cluster.add_node = be_interrupted
    with pytest.raises(KeyboardInterrupt):
        nodes.LocalCluster(1)
    nodes.Cluster.add_node = original
    nodes.LocalCluster(1).stop()
    wait_for(lambda: ray_processes() <= others, "processes of the interrupted start are still there")
    cluster.connect()
    return before, state()


def test_local_cluster_starts_after_a_start_that_was_interrupted():
    before, after = in_another_process(interrupt_a_start)
    assert after == before


def test_local_cluster_leaves_nothing_behind():
    before, after, first, inside, outside = in_another_process(start_two_local_clusters)
    assert first > 1, "the first cluster's processes were expected"
    assert inside["CPU"] == 4 and inside["object_store_memory"] == 2 * nodes.OBJECT_STORE_BYTES
    assert after == before
    assert outside["CPU"] == cluster.logical_cpus()
