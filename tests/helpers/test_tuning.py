"""Each trial trains with its own hyperparameters and is judged on validation images, and a search leaves nothing."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import ray
from ray import tune
from ray.train import Checkpoint, ScalingConfig
from ray.tune.schedulers import ASHAScheduler
from scipy.stats import binomtest

from helpers import _ray_internals, data, evaluation, settings, tuning
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


def all_cpus_are_free():
    _ray_internals.remove_orphaned_placement_groups()
    return ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]


lesson = load_definitions("13", at_once=1)


def search(cfg, space, name):
    train_ds = data.load("train", cfg)
    lesson.__dict__.update(cfg=cfg)
    trial = tune.with_parameters(
        lesson.run_trial,
        train_ds=train_ds,
        validation_ds=data.load("validation", cfg),
        class_names=["dark", "light"],
        statistics=channel_statistics(train_ds),
        scaling_config=ONE_WORKER,
        folder=cfg.path("tuning", name),
        cfg=cfg,
    )
    return lesson.build_tuner(
        tune.with_resources(trial, {"CPU": 0.1}),
        {name: tune.grid_search(values) for name, values in space.items()},
        name,
        [tuning.PrintReports(cfg.epochs)],
        scheduler=ASHAScheduler(grace_period=1, reduction_factor=2, max_t=cfg.epochs, stop_last_trials=False),
    )


@pytest.fixture(scope="module")
def results(cfg):
    found = search(cfg, {"learning_rate": [0.02, 1e-6]}, "two-trials").fit()
    tuning.require_success(found, 2, cfg.epochs)
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


def test_print_reports_keeps_reports_in_order_and_says_how_each_trial_ended(capsys):
    log = tuning.PrintReports(epochs=3)
    ids = [
        SimpleNamespace(trial_id=f"x_{number:05d}", config={"batch_size": 8, "optimizer": "sgd"}) for number in range(2)
    ]
    for number, epoch in ((1, 1), (0, 1), (0, 2)):
        ids[number].last_result = {"training_iteration": epoch, "validation_accuracy": 0.5}
        log.on_trial_result(ids[number], ids[number].last_result)
    ids[0].last_result["training_iteration"] = 3
    for trial in ids:
        log.on_trial_complete(trial)
    first, second = capsys.readouterr().out.splitlines()
    assert (
        "trial  1  finished " in first
        and "trial  2  stopped after epoch 1" in second
        and "batch size 8  optimizer sgd" in second
    )
    assert [(report["trial"], report["epoch"]) for report in log.reports] == [(2, 1), (1, 1), (1, 2)]


def test_decisions_are_those_of_asha():
    """Lesson 13 does ASHA's arithmetic again: fed the same reports, both stop the same trials."""
    rng = np.random.default_rng(0)
    asha = ASHAScheduler(grace_period=2, reduction_factor=2, max_t=8, stop_last_trials=False, metric="m", mode="max")
    trials = [SimpleNamespace(trial_id=f"{number:05d}") for number in range(60)]
    alive, reports, stopped = dict.fromkeys(range(60), 0), [], set()
    for trial in trials:
        asha.on_trial_add(None, trial)
    while alive:
        number = int(rng.choice(list(alive)))
        alive[number] += 1
        report = {"trial": number, "epoch": alive[number], "accuracy": round(float(rng.random()), 1)}
        reports.append(report)
        result = {"training_iteration": report["epoch"], "m": report["accuracy"]}
        if asha.on_trial_result(None, trials[number], result) == ASHAScheduler.STOP:
            stopped.add(number)
        if number in stopped or alive[number] == 7:
            del alive[number]
    decided = lesson.decisions(reports)
    assert len(stopped) > 20 and set(decided[decided["stopped"]]["trial"]) == stopped


def test_margins_are_those_of_the_textbook():
    """McNemar's exact test is scipy's binomial test; Wilson's limits solve (k/n - p)² = z² p (1 - p) / n."""
    for b, c in ((0, 0), (0, 1), (3, 3), (2, 9), (12, 1), (40, 61)):
        exact = binomtest(b, b + c).pvalue if b + c else 1
        assert lesson.mcnemar(b, c) == lesson.mcnemar(c, b) == pytest.approx(exact)
    for k, n in ((0, 5), (5, 5), (7, 40), (331, 357)):
        for p in lesson.wilson(k, n):
            assert (k / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


def test_search_that_was_killed_ends_as_one_that_was_not(cfg, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    images = rng.normal(100 + 40 * labels[:, None, None, None], 30, (64, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    batch = {"image": images, "label": labels}
    names = {"mean": [0.5] * 3, "std": [0.2] * 3, "num_classes": 2, "num_epochs": 4}
    lesson.__dict__.update(
        cfg=replace(cfg, storage=str(tmp_path)), grid={"learning_rate": tune.grid_search([0.001, 0.01, 0.03, 0.1])}
    )
    lesson.__dict__.update(names, asha=lambda: None)
    lesson.grid |= {"batch_size": 16, "seed": 1}
    trial = tune.with_parameters(lesson.train_trial, train=batch, validation=batch, num_epochs=4)
    trial = tune.with_resources(trial, {"CPU": 1})
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(lesson.DoomedSearch.remote().run.remote(trial, "killed"))
    wait_for(all_cpus_are_free, "the dead search keeps its CPUs")
    restored = tune.Tuner.restore(f"{tmp_path}/tuning/killed", trial, param_space=lesson.grid).fit()
    undisturbed = lesson.build_tuner(trial, lesson.grid, "undisturbed", []).fit()
    tuning.require_success(restored, 4, 4)

    def curves(results):
        frames = {r.config["learning_rate"]: r.metrics_dataframe for r in results}
        return {
            rate: f.groupby("training_iteration")["validation_accuracy"].unique().tolist() for rate, f in frames.items()
        }

    assert curves(restored) == curves(undisturbed)
    assert {len(curve) for curve in curves(restored).values()} == {4}


def test_require_success_names_a_trial_that_failed(cfg, capsys):
    failed = search(cfg, {"batch_size": [4096]}, "one-that-fails").fit()
    assert "trial  1  FAILED" in capsys.readouterr().out
    with pytest.raises(tuning.TuningError, match="'batch_size': 4096.*do not fill one batch of 4096"):
        tuning.require_success(failed, 1, cfg.epochs)


def test_require_success_tells_a_failure_of_which_only_the_text_was_kept():
    error = "Traceback (most recent call last):\n  ...\nValueError: boom"
    failed = SimpleNamespace(error=error, config={"batch_size": 8})
    with pytest.raises(tuning.TuningError, match="'batch_size': 8.*ValueError: boom"):
        tuning.require_success([failed], 1, 2)


def test_require_success_tells_a_stopped_search_from_one_that_ended():
    """Ray's saved state of a trial that has ended may lack `done` or the last epoch when the search was killed."""

    def trial(file=None, **metrics):
        metrics = {"validation_accuracy": 0.5, **metrics}
        return SimpleNamespace(error=None, config={}, metrics=metrics, metrics_dataframe=file)

    ended, pruned = trial(training_iteration=8), trial(training_iteration=2, done=True)
    file = pd.DataFrame({"training_iteration": [1, 2], "done": [False, True]})
    tuning.require_success([ended, pruned, trial(file, training_iteration=1)], 3, 8)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after \[7\] of 8 epochs"):
        tuning.require_success([ended, pruned, trial(training_iteration=7)], 3, 8)
    with pytest.raises(KeyboardInterrupt, match=r"\[1\] of 8"):
        tuning.require_success([trial(file[:1], training_iteration=1)], 1, 8)
    never = SimpleNamespace(error=None, config={}, metrics=None, metrics_dataframe=None)
    with pytest.raises(KeyboardInterrupt, match=r"\[0\] of 8"):
        tuning.require_success([never], 1, 8)
