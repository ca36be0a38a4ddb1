"""Several nodes on one machine: training survives the death of one, and nothing of them is left behind."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from helpers import cluster, faults, nodes
from support import ray_processes, wait_for

pytestmark = pytest.mark.usefixtures("shared_ray")


def in_another_process(function):
    """Call `function` elsewhere: the Ray that all tests share belongs to this process and would end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as another:
        return another.submit(function).result()


def train_while_a_node_dies():
    local_cluster = nodes.LocalCluster(2)
    try:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        step_log = ray.remote(faults.StepLog).options(num_cpus=0, scheduling_strategy=here).remote([5])
        train_loop = faults.inject_faults(step_log, nodes.kill_node)
        two = ray.train.ScalingConfig(num_workers=2, placement_strategy="SPREAD")
        history = faults.build_short_trainer(faults.unique_run_name(), 2, train_loop, two).fit().return_value
        return history, ray.get(step_log.entries.remote()), len(cluster.alive_nodes())
    finally:
        local_cluster.stop()


def test_kill_node_training_resumes_on_the_other_node():
    history, entries, alive = in_another_process(train_while_a_node_dies)
    assert alive == 2, "the head and one node"
    assert len({entry["node"] for entry in entries}) == 2, "training did not move to another node"
    steps = [entry["step"] for entry in entries]
    assert steps == [*range(1, 6), *range(4, 10)], "it should resume after step 3, the end of epoch 1"
    assert [metrics["epoch"] for metrics in history] == [0, 1, 2]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


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
