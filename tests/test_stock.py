"""A `fit()` finds its processes waiting, and Ray starts no more of them than are needed."""

import os
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import ray
from conftest import ray_processes
from ray.train import ScalingConfig

from helpers import cluster, faults, stock
from helpers.training import train_loop_ray_train_ray_data


def waiting(since: float) -> int:
    return sum("ray::IDLE" in one.info["cmdline"] and one.create_time() > since for one in ray_processes())


def children_of(notebook) -> list[psutil.Process]:
    return psutil.Process(notebook.pid).children(recursive=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_fit_finds_its_processes_waiting(workers):
    scaling_config = ScalingConfig(num_workers=workers)
    trainer = faults.build_short_trainer(faults.new_name(), 0, scaling_config=scaling_config, num_epochs=1)
    ordered = time.time() - 0.1  # a process's start is known to a hundredth of a second
    stock.order_for_training(workers)
    deadline = time.monotonic() + 60
    while waiting(since=ordered) < {1: 7, 2: 10}[workers]:
        assert time.monotonic() < deadline, "the stock never came"
        time.sleep(0.2)
    start = time.time()

    def train_loop(config):
        history = train_loop_ray_train_ray_data(config)
        everything = [process.as_dict(["cmdline", "create_time"]) for process in psutil.process_iter()]
        titles = [one["cmdline"][0] for one in everything if one["cmdline"] and one["create_time"] > start]
        return history, [title for title in titles if title.startswith("ray::")]

    trainer.train_loop_per_worker = train_loop
    history, started_meanwhile = trainer.fit().return_value
    assert len(history) == 1
    assert started_meanwhile == [], "Ray Train asks for processes with another environment than those in stock"


def test_a_machine_with_many_cores_starts_no_process_for_each_of_them():
    code = """
        from helpers import cluster
        cluster.logical_cpus = lambda: 24
        cluster.connect()
        input()
    """
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=alone) as notebook:
        started, deadline = [], time.monotonic() + 60
        while sum("ray::IDLE" in title for title in started) < stock.READERS + 2:
            assert time.monotonic() < deadline, started
            time.sleep(0.2)
            started = [" ".join(process.cmdline()[:2]) for process in children_of(notebook)]
        workers = [title for title in started if "ray::IDLE" in title or "_worker.py" in title]
        notebook.communicate(b"\n")
    assert len(workers) == stock.READERS + 2


def test_what_a_fit_used_up_is_replaced_its_readers_once_a_notebook(monkeypatch):
    orders = []
    monkeypatch.setattr(stock, "order_for_training", lambda workers, readers: orders.append((workers, readers)))
    monkeypatch.setattr(cluster, "_job_with_readers", None)
    cluster.replace_used(1)
    cluster.replace_used(2)
    assert orders == [(1, stock.READERS), (2, 0)]
    monkeypatch.delenv("RAY_ADDRESS")  # a Ray that ends with its notebook
    cluster.replace_used(1)
    assert len(orders) == 2


def test_without_the_service_there_is_no_stock_and_no_error(monkeypatch):
    nodes = [{**node, "NodeManagerPort": 1} for node in ray.nodes()]
    monkeypatch.setattr(stock.ray, "nodes", lambda: nodes)
    stock.order_for_data()
