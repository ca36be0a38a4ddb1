"""A search judges trials on pictures that no trial trains on, each with its own hyperparameters, and leaves nothing."""

import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.train import Checkpoint, ScalingConfig

from helpers import cluster, data, evaluation, settings, tuning
from helpers.preprocessing import channel_statistics
from helpers.splitting import hash_fraction, train_validation_split
from helpers.training import evaluate

ONE_WORKER = ScalingConfig(num_workers=1)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Two easy classes, 300 pictures to train on; every tenth test picture lies in the wrong folder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 150), ("test", 20)):
        for name, mean in (("dark", 90), ("light", 150)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.normal(240 - mean if index % 10 == 0 else mean, 40, (32, 32, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    return settings.Settings(data=str(folder), epochs=2, batch_size=16, learning_rate=0.02, storage=storage)


@pytest.fixture(scope="module")
def parts(chosen):
    return train_validation_split(data.load("train", chosen), pictures=768, seed=1)


def rows(dataset):
    return Counter(
        (image.tobytes(), int(label))
        for batch in dataset.iter_batches(batch_size=64)
        for image, label in zip(batch["image"], batch["label"], strict=True)
    )


def test_the_split_is_disjoint_and_complete(chosen, parts):
    training, validation = map(rows, parts)
    assert training.total() + validation.total() == 300
    assert not training & validation
    assert training + validation == rows(data.load("train", chosen)), "a picture was lost, or has another label"
    assert 60 <= validation.total() <= 140, "about a third"


def test_the_split_is_fixed_by_its_seed_whatever_the_order(chosen, parts):
    train_ds = data.load("train", chosen)
    mixed = train_ds.random_shuffle(seed=3).repartition(5)
    assert [rows(part) for part in train_validation_split(mixed, pictures=768, seed=1)] == [
        rows(part) for part in parts
    ]
    other = train_validation_split(train_ds, pictures=768, seed=2)
    assert rows(other[1]) != rows(parts[1])


def test_a_part_of_the_pictures_is_drawn(chosen):
    training, validation = map(rows, train_validation_split(data.load("train", chosen), pictures=90, seed=1))
    assert 50 <= training.total() + validation.total() <= 130
    assert not training & validation


def test_too_few_pictures_to_hold_some_out():
    one = ray.data.from_items([{"image": np.zeros((4, 4, 3), np.uint8), "label": 0}])
    with pytest.raises(ValueError, match="1 training pictures are too few"):
        train_validation_split(one, pictures=768, seed=1)


def test_equal_pictures_hash_to_equal_fractions_and_others_spread():
    images = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), dtype=np.uint8)
    images[1] = images[0]
    fractions = hash_fraction(images, seed=7)
    assert fractions[0] == fractions[1] and ((0 <= fractions) & (fractions < 1)).all()
    assert np.histogram(fractions, bins=4, range=(0, 1))[0].min() > 400
    assert abs(np.corrcoef(fractions, hash_fraction(images, seed=8))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"lr": [0.1]}, "has 'lr'; what can be tuned here: learning_rate, batch_size"),
        ({}, "needs a list of values to try for learning_rate"),
        ({"batch_size": []}, "needs a list of values to try for batch_size"),
        ({"learning_rate": 0.1}, "needs a list of values to try for learning_rate"),
        ({"learning_rate": [0.1, 0]}, "A learning rate of 0 can't be tried"),
        ({"learning_rate": ["fast"]}, "A learning rate of 'fast' can't be tried"),
        ({"batch_size": [32, 31]}, "A batch of 31 pictures can't be shared evenly by the workers, 2 a trial"),
        ({"batch_size": [0.5]}, "A batch of 0.5 pictures can't be shared"),
        ({"batch_size": [64, 256]}, "200 pictures to train on do not fill one batch of 256"),
    ],
)
def test_a_search_space_that_can_not_be_searched(chosen, space, says):
    with pytest.raises(tuning.TuningError, match=says):
        tuning.check_space(space, pictures=200, workers=2, chosen=chosen)


def test_a_search_space_says_how_many_trials_it_makes(chosen):
    assert tuning.check_space({"learning_rate": [0.1, 0.2, 0.3], "batch_size": [16, 32]}, 200, 2, chosen) == 6


@pytest.mark.parametrize(
    ("batch_size", "pictures", "workers", "sizes"),
    [(64, 512, 1, [32, 16]), (64, 512, 3, [30, 15]), (64, 40, 1, [10, 5]), (2, 40, 2, [2]), (64, 8, 4, [4])],
)
def test_two_batch_sizes_that_can_be_tried(batch_size, pictures, workers, sizes):
    chosen = settings.Settings(batch_size=batch_size)
    assert tuning.two_batch_sizes(chosen, pictures, workers) == sizes
    assert tuning.check_space({"batch_size": sizes}, pictures, workers, chosen) == len(sizes)


def test_trials_at_once_leave_a_cpu_for_those_who_read(chosen):
    scaling, at_once = tuning.plan_trials(4, chosen)
    held = at_once * (scaling.total_resources["CPU"] + tuning.DRIVER_CPUS)
    assert 1 <= at_once <= 4
    assert ray.cluster_resources()["CPU"] - held >= at_once * tuning.DATA_CPUS


def test_too_few_cpus_are_told_at_once(chosen):
    from dataclasses import replace

    with pytest.raises(cluster.ClusterError, match=r"One trial needs 1001\.1 CPU.*and this Ray has"):
        tuning.plan_trials(4, replace(chosen, workers=1000))


def test_occupied_cpus_are_told_instead_of_a_wait_without_end(chosen):
    occupy = ray.remote(num_cpus=cluster.logical_cpus() - 1)(lambda: time.sleep(600)).remote()
    try:
        wait_for(lambda: ray.available_resources().get("CPU", 0) <= 1)
        with pytest.raises(cluster.ClusterError, match="let the other lesson finish"):
            tuning.plan_trials(4, chosen, seconds=1)
    finally:
        ray.cancel(occupy, force=True)
    wait_for(lambda: available().get("CPU", 0) == ray.cluster_resources()["CPU"])


def available():
    cluster.remove_orphaned_placement_groups()
    return ray.available_resources()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)


def search(chosen, parts, space, name):
    training, validation = parts
    return tuning.build_tuner(
        space,
        1,
        name,
        chosen,
        train_ds=training,
        validation_ds=validation,
        class_names=["dark", "light"],
        statistics=channel_statistics(training),
        scaling_config=ONE_WORKER,
    )


@pytest.fixture(scope="module")
def results(chosen, parts):
    found = search(chosen, parts, {"learning_rate": [0.02, 1e-6]}, "two-trials").fit()
    tuning.require_success(found, 2)
    return found


def checkpoint_of(result):
    return evaluation.load_model(Checkpoint(result.metrics["checkpoint_path"], filesystem=result.filesystem))


def test_each_trial_trains_with_its_own_hyperparameters(results):
    assert sorted(result.config["learning_rate"] for result in results) == [1e-6, 0.02]
    for result in results:
        _, config = checkpoint_of(result)
        assert config["learning_rate"] == result.config["learning_rate"]
    assert len({result.metrics["checkpoint_path"] for result in results}) == 2


def test_the_hopeless_trial_is_stopped_early(results):
    reports = {result.config["learning_rate"]: len(result.metrics_dataframe) for result in results}
    assert reports == {0.02: 2, 1e-6: 1}


def test_the_log_says_how_each_trial_ended(capsys):
    log = tuning.PrintReports(epochs=3)
    for number, epochs in enumerate((3, 1)):
        log.on_trial_complete(SimpleNamespace(trial_id=f"x_{number:05d}", last_result={"training_iteration": epochs}))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("trial 1  finished") and second.endswith("trial 2  stopped")


def test_the_best_checkpoint_gives_what_was_reported_on_the_validation_pictures(results, parts):
    best = results.get_best_result()
    assert best.config == {"learning_rate": 0.02}
    model, config = checkpoint_of(best)
    loss, correct, pictures = evaluate(model, parts[1].iter_torch_batches(batch_size=7), config)
    assert pictures == parts[1].count()
    assert best.metrics["test_accuracy"] == pytest.approx(float(correct / pictures))
    assert best.metrics["test_loss"] == pytest.approx(float(loss / pictures), rel=1e-4)


def test_a_search_leaves_no_process_that_holds_a_cpu(results):
    wait_for(lambda: available().get("CPU", 0) == ray.cluster_resources()["CPU"])


def test_the_losers_checkpoints_are_deleted_and_the_best_stays(results):
    best = results.get_best_result()
    tuning.discard_losers(results, best)
    for result in results:
        info = result.filesystem.get_file_info(result.metrics["checkpoint_path"])
        assert (info.type.name == "Directory") == (result.metrics["trial_id"] == best.metrics["trial_id"])


def test_a_trial_that_fails_is_not_passed_over(chosen, parts, capsys):
    failed = search(chosen, parts, {"batch_size": [4096]}, "one-that-fails").fit()
    assert "trial 1  FAILED" in capsys.readouterr().out
    with pytest.raises(tuning.TuningError, match="'batch_size': 4096.*do not fill one batch of 4096"):
        tuning.require_success(failed, 1)


def test_a_failure_of_which_only_the_text_was_kept_is_told_all_the_same():
    failed = SimpleNamespace(
        error="Traceback (most recent call last):\n  ...\nValueError: boom", config={"batch_size": 8}
    )
    with pytest.raises(tuning.TuningError, match="'batch_size': 8.*ValueError: boom"):
        tuning.require_success([failed], 1)
