"""The promise of the series on real workers: it learns, its metrics are right, it trains anew or goes on as told."""

import numpy as np
import pytest
import torch
from ray.train import ScalingConfig

from helpers import cluster, data, evaluation, progress, settings, trainer
from helpers.model import build_model
from helpers.trainer import build_trainer
from helpers.training import evaluate

TWO_WORKERS = ScalingConfig(num_workers=2)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Two easy classes: 320 pictures to train on and 61 to test with, which two workers can't share evenly.

    Every tenth test picture lies in the wrong folder, so that no loss can become zero.
    """
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (160, 160)), ("test", (30, 31))):
        for name, mean, count in zip(("dark", "light"), (90, 150), counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (
                    rng.normal(240 - mean if split == "test" and index % 10 == 0 else mean, 40, (32, 32, 3))
                    .clip(0, 255)
                    .astype(np.uint8)
                )
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    # A URI: the lessons themselves train into a plain folder.
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    return settings.Settings(data=str(folder), epochs=2, batch_size=32, learning_rate=0.02, storage=storage)


@pytest.fixture(scope="module")
def finished(chosen):
    run = build_trainer(chosen, TWO_WORKERS)
    return run, run.fit()


def test_two_workers_learn(finished):
    _, result = finished
    history = result.return_value
    assert [metrics["epoch"] for metrics in history] == [0, 1]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["test_accuracy"] > 0.8


def test_reported_metrics_equal_a_single_process_on_the_whole_split(chosen, finished):
    _, result = finished
    model, config = evaluation.load_model(result.checkpoint)
    loss, correct, pictures = evaluate(model, data.load("test", chosen).iter_torch_batches(batch_size=7), config)
    assert pictures == 61, "a test picture was dropped"
    assert result.metrics["test_accuracy"] == pytest.approx(float(correct / pictures))
    # Close enough to notice batch-norm statistics that differ between the workers: those are off by 3 in 1,000.
    assert result.metrics["test_loss"] == pytest.approx(float(loss / pictures), rel=1e-4)


def test_the_run_is_named_for_its_data_and_reports_lie_beside_it(chosen, finished):
    run, result = finished
    assert run.run_config.name.startswith(f"dist-{chosen.data_name}-res18-ray-data-")
    from helpers.progress import reports_folder

    filesystem, path = reports_folder(run.run_config)
    import pyarrow.fs

    assert len(filesystem.get_file_info(pyarrow.fs.FileSelector(path))) == 2


def test_a_checkpoint_holds_what_resuming_needs(finished):
    _, result = finished
    with result.checkpoint.as_directory() as folder:
        state = torch.load(f"{folder}/state.pt", weights_only=True)
    assert set(state) == {"model", "optimizer", "scheduler", "random_state", "history", "config"}
    assert len(state["history"]) == 2 and state["scheduler"]["last_epoch"] == 20
    assert state["config"]["class_names"] == ["dark", "light"]


def test_a_second_fit_trains_anew(chosen, finished, capsys):
    first, _ = finished
    second = build_trainer(chosen, ScalingConfig(num_workers=1))
    assert second.run_config.name != first.run_config.name
    with progress.shown(second):
        history = second.fit().return_value
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(shown) == 2 and "epoch 1/2   train loss" in shown[0] and "test accuracy" in shown[1]
    assert [metrics["epoch"] for metrics in history] == [0, 1]
    assert history[0]["train_loss"] > 1.2 * history[1]["train_loss"], "it started from a trained model"


def test_the_same_name_goes_on_from_the_checkpoint(chosen, finished):
    first, result = finished
    longer = build_trainer(chosen, ScalingConfig(num_workers=1))
    longer.run_config.name = first.run_config.name
    longer.train_loop_config["num_epochs"] = 3
    # The schedule that is loaded ends after two epochs; one more step of it would be an error.
    with pytest.raises(Exception, match="step"):
        longer.fit()
    same = build_trainer(chosen, ScalingConfig(num_workers=1))
    same.run_config.name = first.run_config.name
    assert same.fit().return_value == result.return_value, "a finished run was trained again"


@pytest.mark.parametrize(
    ("choices", "workers", "says"),
    [
        ({"batch_size": 33}, 2, "33 pictures can't be shared evenly by 2 workers: set TUTORIAL_BATCH_SIZE to 32"),
        ({"batch_size": 1024}, 2, "320 training pictures do not fill one batch of 1024"),
    ],
)
def test_a_batch_size_that_does_not_fit(chosen, choices, workers, says):
    from dataclasses import replace

    with pytest.raises(ValueError, match=says):
        build_trainer(replace(chosen, **choices), ScalingConfig(num_workers=workers))


def test_too_many_workers_are_refused_before_anything_starts(chosen):
    with pytest.raises(cluster.ClusterError, match="1000 workers need 1000 CPU, and this Ray has"):
        build_trainer(chosen, ScalingConfig(num_workers=1000))


def test_run_names_are_unique(chosen):
    assert len({trainer.build_run_config(chosen).name for _ in range(20)}) == 20


def test_the_network_takes_small_pictures():
    model = build_model(7).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model.layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32)))).shape[-1] == 16


def test_an_evaluation_is_kept_and_found_again(chosen, finished):
    _, result = finished
    evaluation.save(result, 0.75, 61, chosen)
    record = evaluation.latest(chosen)
    assert (record["accuracy"], record["pictures"], record["epochs"]) == (0.75, 61, 2)
