"""Each trial trains with its own hyperparameters and is judged on validation images, and a search leaves nothing."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
from ray.train import Checkpoint, ScalingConfig

from helpers import _ray_internals, cluster, data, evaluation, settings, tuning
from helpers.preprocessing import channel_statistics
from helpers.training import evaluate
from support import load_definitions, make_image_folder, wait_for

pytestmark = pytest.mark.usefixtures("shared_ray")
ONE_WORKER = ScalingConfig(num_workers=1)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = make_image_folder(tmp_path_factory.mktemp("images"), {"train": 100, "validation": 50, "test": 5})
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    return settings.Settings(data=str(folder), epochs=2, batch_size=16, learning_rate=0.02, storage=storage)


def test_plan_trials_leaves_a_cpu_for_data_tasks(cfg):
    scaling, at_once = tuning.plan_trials(4, cfg)
    held = at_once * (scaling.total_resources["CPU"] + tuning.DRIVER_CPUS)
    assert 1 <= at_once <= 4
    assert ray.cluster_resources()["CPU"] - held >= at_once * tuning.DATA_CPUS


def test_plan_trials_refuses_too_few_cpus(cfg):
    with pytest.raises(cluster.ClusterError, match=r"One trial.* needs 1001\.1 CPU.*and this Ray has"):
        tuning.plan_trials(4, replace(cfg, workers=1000))


def test_plan_trials_names_cpus_in_use(cfg):
    occupy = ray.remote(num_cpus=cluster.logical_cpus() - 1)(lambda: time.sleep(600)).remote()
    try:
        wait_for(lambda: ray.available_resources().get("CPU", 0) <= 1)
        with pytest.raises(cluster.ClusterError, match="let the other lesson finish"):
            tuning.plan_trials(4, cfg, seconds=1)
    finally:
        ray.cancel(occupy, force=True)
    wait_for(all_cpus_are_free)


def all_cpus_are_free():
    _ray_internals.remove_orphaned_placement_groups()
    return ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]


def search(cfg, space, name):
    train_ds = data.load("train", cfg)
    return load_definitions("09").build_tuner(
        space,
        1,
        name,
        cfg,
        train_ds=train_ds,
        validation_ds=data.load("validation", cfg),
        class_names=["dark", "light"],
        statistics=channel_statistics(train_ds),
        scaling_config=ONE_WORKER,
    )


@pytest.fixture(scope="module")
def results(cfg):
    found = search(cfg, {"learning_rate": [0.02, 1e-6]}, "two-trials").fit()
    tuning.require_success(found, 2)
    return found


def checkpoint_of(result):
    return evaluation.load_model(Checkpoint(result.metrics["checkpoint_path"], filesystem=result.filesystem))


def test_trials_train_with_their_own_hyperparameters(results):
    assert sorted(result.config["learning_rate"] for result in results) == [1e-6, 0.02]
    for result in results:
        _, config = checkpoint_of(result)
        assert config["learning_rate"] == result.config["learning_rate"]
    assert len({result.metrics["checkpoint_path"] for result in results}) == 2


def test_best_checkpoint_gives_what_was_reported_on_the_validation_images(cfg, results):
    best = results.get_best_result()
    assert best.config == {"learning_rate": 0.02}
    model, config = checkpoint_of(best)
    loss, correct, count = evaluate(model, data.load("validation", cfg).iter_torch_batches(batch_size=7), config)
    assert count == 100
    assert best.metrics["validation_accuracy"] == pytest.approx(float(correct / count))
    assert best.metrics["validation_loss"] == pytest.approx(float(loss / count), rel=1e-4)


def test_search_leaves_no_process_that_holds_a_cpu(results):
    wait_for(all_cpus_are_free)


def test_discard_losers_keeps_the_best_checkpoint_only(results):
    best = results.get_best_result()
    tuning.discard_losers(results, best)
    for result in results:
        info = result.filesystem.get_file_info(result.metrics["checkpoint_path"])
        assert (info.type.name == "Directory") == (result.metrics["trial_id"] == best.metrics["trial_id"])


def test_print_reports_says_how_each_trial_ended(capsys):
    log = tuning.PrintReports(epochs=3)
    for number, epochs in enumerate((3, 1)):
        log.on_trial_complete(SimpleNamespace(trial_id=f"x_{number:05d}", last_result={"training_iteration": epochs}))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("trial 1  finished") and second.endswith("trial 2  stopped")


def test_require_success_names_a_trial_that_failed(cfg, capsys):
    failed = search(cfg, {"batch_size": [4096]}, "one-that-fails").fit()
    assert "trial 1  FAILED" in capsys.readouterr().out
    with pytest.raises(tuning.TuningError, match="'batch_size': 4096.*do not fill one batch of 4096"):
        tuning.require_success(failed, 1)


def test_require_success_tells_a_failure_of_which_only_the_text_was_kept():
    error = "Traceback (most recent call last):\n  ...\nValueError: boom"
    failed = SimpleNamespace(error=error, config={"batch_size": 8})
    with pytest.raises(tuning.TuningError, match="'batch_size': 8.*ValueError: boom"):
        tuning.require_success([failed], 1)
