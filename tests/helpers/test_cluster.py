"""Ray is found or refused quickly, and training leaves room for data tasks."""

import os
import subprocess
import sys
import tempfile

import pytest
import ray
import ray.data
from ray.train import ScalingConfig

from helpers import cluster, settings
from support import wait_for

pytestmark = pytest.mark.usefixtures("shared_ray")
CONNECT = """
from helpers import cluster

try:
    cluster.connect()
except cluster.ClusterError as error:
    print(error)
"""


def connect(**variables):
    """Connect in a process of its own, with these variables; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    done = subprocess.run([sys.executable, "-c", CONNECT], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_scaling_config_trains_with_two_workers_and_leaves_cpus_for_data():
    scaling = cluster.scaling_config(settings.Settings())
    assert scaling.num_workers == (int(ray.cluster_resources().get("GPU", 0)) or 2)
    assert scaling.total_resources["CPU"] < ray.cluster_resources()["CPU"]


def test_scaling_config_follows_the_learner():
    assert cluster.scaling_config(settings.Settings(workers=3)).num_workers == 3


def test_scaling_config_on_a_cluster_gives_each_machine_a_worker(monkeypatch):
    machines = [{"Resources": {"CPU": 8.0}}, {"Resources": {"CPU": 4.0}}, {"Resources": {"memory": 1.0}}]
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    monkeypatch.setattr(cluster, "alive_nodes", lambda: machines)
    scaling = cluster.scaling_config(settings.Settings())
    assert (scaling.num_workers, scaling.placement_strategy) == (2, "SPREAD")
    assert scaling.resources_per_worker == {"CPU": 3}, "one CPU of the smaller machine should be left for data tasks"
    assert cluster.scaling_config(settings.Settings(workers=5)).total_resources["CPU"] == 5


def test_require_resources_refuses_more_than_there_is():
    many = ScalingConfig(num_workers=1000, use_gpu=True, resources_per_worker={"CPU": 0, "GPU": 1})
    with pytest.raises(cluster.ClusterError, match=r"1000 workers need 1000 GPU, and this Ray has \d+: set TUTORIAL_W"):
        cluster.require_resources(many, seconds=600)


def test_require_resources_leaves_a_cpu_for_data_tasks():
    cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(cluster.ClusterError, match=f"{cpus} workers need all {cpus} CPU of this Ray and leave none"):
        cluster.require_resources(ScalingConfig(num_workers=cpus))
    cluster.require_resources(ScalingConfig(num_workers=cpus - 1))


def test_require_resources_leaves_a_cpu_to_the_data_of_all_trainings():
    cpus = int(ray.cluster_resources()["CPU"])
    other_trainings = ray.util.placement_group([{"CPU": 1}] * (cpus - 2))
    ray.get(other_trainings.ready())
    try:
        with pytest.raises(cluster.ClusterError, match="2 workers and the tasks .* need 3 CPU, and only 2 are free"):
            cluster.require_resources(ScalingConfig(num_workers=2), seconds=1)
        cluster.require_resources(ScalingConfig(num_workers=1))
    finally:
        ray.util.remove_placement_group(other_trainings)
    cluster.require_resources(ScalingConfig(num_workers=2))


def test_require_resources_names_those_in_use():
    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    class Holder:
        def ready(self):
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    wait_for(lambda: not ray.available_resources().get("CPU"), "Ray never said that its CPUs were taken")
    try:
        with pytest.raises(cluster.ClusterError, match="only 0 are free: let the other lesson finish"):
            cluster.require_resources(ScalingConfig(num_workers=1), seconds=1)
    finally:
        ray.kill(holder)
    cluster.require_resources(ScalingConfig(num_workers=1))


@pytest.mark.parametrize(
    ("resources", "pool"),
    [
        ({"CPU": 64.0, "GPU": 3.0}, (3, {"num_gpus": 1})),
        ({"CPU": 64.0, "GPU": 1.0}, (2, {"num_gpus": 0.5})),
        ({"CPU": 64.0}, (2, {"num_cpus": 2})),
    ],
)
def test_actor_pool_suits_what_ray_has(monkeypatch, resources, pool):
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "available_resources", lambda: resources)
    monkeypatch.setattr(cluster, "cores", lambda: 8)
    assert cluster.actor_pool(settings.Settings()) == pool


def test_connect_names_an_address_where_nothing_answers():
    assert "No Ray answers at RAY_ADDRESS=127.0.0.1:9" in connect(RAY_ADDRESS="127.0.0.1:9")


def test_connect_adds_rays_port_to_a_bare_host():
    assert "No Ray answers at RAY_ADDRESS=127.0.0.2:6379" in connect(RAY_ADDRESS="127.0.0.2")


def test_connect_names_a_temporary_folder_with_a_long_path():
    with tempfile.TemporaryDirectory() as short:
        long = os.path.join(short, "x" * 80)
        os.mkdir(long)
        printed = connect(TMPDIR=long)
    assert "set RAY_TMPDIR to a short one" in printed and "Traceback" not in printed


@pytest.mark.parametrize(("storage", "said"), [("storage", ""), ("file/below", "can't write (")])
def test_connect_writes_to_a_bucket(tmp_path, storage, said):
    (tmp_path / "file").touch()
    printed = connect(RAY_ADDRESS=os.environ["RAY_ADDRESS"], TUTORIAL_STORAGE=f"file://{tmp_path}/{storage}")
    assert said in printed and bool(said) == bool(printed)
    assert not list(tmp_path.rglob(".seen-by-all*"))


@pytest.mark.parametrize(("cpus", "new_reader"), [(63, False), (64, True)])
def test_connect_keeps_the_older_parquet_reader_where_there_are_few_cpus(monkeypatch, cpus, new_reader):
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "use_datasource_v2", True)
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    monkeypatch.setattr(cluster, "_require_same_torch", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    cluster.connect()
    assert context.use_datasource_v2 == new_reader


def test_connect_sends_no_usage_report():
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
