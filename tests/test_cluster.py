"""Ray is found or refused quickly, and the preflight sees what is wrong."""

import os
import subprocess
import sys
import time

import pytest
import ray
import ray.util.state
from ray.train import ScalingConfig
from ray.util.state.exception import ServerUnavailable

from helpers import cluster, preflight, settings


def test_training_leaves_cpus_for_data():
    scaling = cluster.scaling_config(settings.Settings())
    assert scaling.total_resources["CPU"] < ray.cluster_resources()["CPU"]


def test_the_reader_chooses_the_workers():
    assert cluster.scaling_config(settings.Settings(workers=3)).num_workers == 3


def test_a_cluster_without_gpus_gets_a_worker_on_each_machine_that_computes(monkeypatch):
    machines = [{"Resources": {"CPU": 8.0}}, {"Resources": {"CPU": 4.0}}, {"Resources": {"memory": 1.0}}]
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    monkeypatch.setattr(cluster, "alive_nodes", lambda: machines)
    scaling = cluster.scaling_config(settings.Settings())
    assert (scaling.num_workers, scaling.placement_strategy) == (2, "SPREAD")
    assert scaling.resources_per_worker == {"CPU": 3}, "one CPU of the smaller machine should be left for reading"
    assert cluster.scaling_config(settings.Settings(workers=5)).total_resources["CPU"] == 5


def test_more_than_there_is_gets_a_quick_sentence():
    start = time.monotonic()
    with pytest.raises(cluster.ClusterError, match="2 workers need 2 GPU, and this Ray has 0: set TUTORIAL_WORKERS"):
        cluster.require(ScalingConfig(num_workers=2, use_gpu=True))
    assert time.monotonic() - start < 5


def test_busy_cpus_get_another_sentence():
    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    class Holder:
        def ready(self):
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    try:
        with pytest.raises(cluster.ClusterError, match="only 0 are free: let the other lesson finish"):
            cluster.require(ScalingConfig(num_workers=1), seconds=1)
    finally:
        ray.kill(holder)
    cluster.require(ScalingConfig(num_workers=1))


def test_what_runs_in_a_local_ray_asks_no_dashboard_least_of_all_another_rays():
    @ray.remote
    def ask():
        ray.util.state.get_actor("0" * 32)

    # ServerUnavailable is what the process that frees a dead run's CPUs expects; anything else ends it, or holds it up
    with pytest.raises(ServerUnavailable, match="no-dashboard"):
        ray.get(ask.remote())


def test_an_address_where_nobody_answers():
    code = "from helpers import cluster\ntry:\n cluster.connect()\nexcept cluster.ClusterError as e:\n print(e)"
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "No Ray answers at RAY_ADDRESS=127.0.0.1:9" in done.stdout, done.stderr


def test_the_preflight_passes_here():
    report = preflight.run()
    assert not report.failed
    assert "helpers on a worker" in repr(report)


def test_the_preflight_sees_storage_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check = preflight.storage(settings.Settings(storage=str(tmp_path / "file" / "below")))
    assert check.state == "fail" and "can't be written" in check.found and "TUTORIAL_STORAGE" in check.found


def test_the_preflight_sees_too_little_memory():
    check = preflight.memory(needed=2**60)
    assert check.state == "fail" and "Close programs" in check.remedy


def test_no_usage_report_leaves_this_machine():
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()
