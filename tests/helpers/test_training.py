"""The promise of the series on real workers: it learns, its metrics are right, it starts over or resumes as told."""

import re
from dataclasses import replace

import nbformat
import numpy as np
import pyarrow.fs
import pytest
import torch
from PIL import Image
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import cluster, data, evaluation, settings, trainer, training
from helpers.model import build_model
from helpers.progress import reports_folder, show_progress
from helpers.trainer import build_trainer, check_batch_size
from support import NOTEBOOKS

pytestmark = pytest.mark.usefixtures("shared_ray")
TWO_WORKERS = ScalingConfig(num_workers=2)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Two easy classes: 320 images to train on and 61 to validate with, which two workers can't share evenly.

    Every tenth validation image is in the wrong folder, so that no loss can become zero.
    """
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (160, 160)), ("validation", (30, 31)), ("test", (5, 5))):
        for name, mean, count in zip(("dark", "light"), (90, 150), counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                brightness = 240 - mean if split == "validation" and index % 10 == 0 else mean
                pixels = rng.normal(brightness, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    # A URI: the lessons themselves train into a plain folder.
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    return settings.Settings(data=str(folder), epochs=2, batch_size=32, learning_rate=0.02, storage=storage)


@pytest.fixture(scope="module")
def finished(cfg):
    run = build_trainer(cfg, TWO_WORKERS)
    return run, run.fit()


def test_fit_two_workers_learn(finished):
    _, result = finished
    history = result.return_value
    assert [metrics["epoch"] for metrics in history] == [0, 1]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["validation_accuracy"] > 0.8


def test_metrics_equal_a_single_process_on_the_whole_split(cfg, finished):
    _, result = finished
    model, config = evaluation.load_model(result.checkpoint)
    batches = data.load("validation", cfg).iter_torch_batches(batch_size=7)
    loss, correct, count = training.evaluate(model, batches, config)
    assert count == 61, "a validation image was dropped"
    assert result.metrics["validation_accuracy"] == pytest.approx(float(correct / count))
    # Close enough to notice batch-norm statistics that differ between the workers: those are off by 3 in 1,000.
    assert result.metrics["validation_loss"] == pytest.approx(float(loss / count), rel=1e-4)


def test_metrics_hold_where_the_time_went(finished):
    _, result = finished
    for metrics in result.return_value:
        assert set(metrics["seconds"]) == {"data", "steps", "validation", "report"}
        assert all(seconds > 0 for seconds in metrics["seconds"].values())


def test_run_is_named_after_its_data_and_writes_reports(cfg, finished):
    run, _ = finished
    assert run.run_config.name.startswith(f"dist-{cfg.data_name}-res18-ray-data-")
    filesystem, path = reports_folder(run.run_config)
    assert len(filesystem.get_file_info(pyarrow.fs.FileSelector(path))) == 2


def test_checkpoint_holds_what_resuming_needs(finished):
    _, result = finished
    with result.checkpoint.as_directory() as folder:
        state = torch.load(f"{folder}/state.pt", weights_only=True)
    assert set(state) == {"model", "optimizer", "scheduler", "random_states", "history", "config"}
    assert len(state["history"]) == 2 and state["scheduler"]["last_epoch"] == 20
    assert state["config"]["class_names"] == ["dark", "light"]
    assert len(state["random_states"]) == 2, "one for each worker"


def test_random_state_restores_every_generator():
    import random

    state = training.get_random_state()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    training.set_random_state(state)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and np.array_equal(drawn[1], again[1]) and drawn[2] == again[2]


def test_fit_starts_over_under_another_name_and_resumes_under_the_same(cfg, finished, capsys):
    first, result = finished
    second = build_trainer(cfg, ScalingConfig(num_workers=1))
    assert second.run_config.name != first.run_config.name
    with show_progress(second):
        history = second.fit().return_value
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(shown) == 2 and "epoch 1/2   train loss" in shown[0] and "validation accuracy" in shown[1]
    assert [metrics["epoch"] for metrics in history] == [0, 1]
    assert history[0]["train_loss"] > 1.2 * history[1]["train_loss"], "it started from a trained model"
    same = build_trainer(cfg, ScalingConfig(num_workers=1))
    same.run_config.name = first.run_config.name
    resumed = same.fit().return_value
    assert [m["train_loss"] for m in resumed] == [m["train_loss"] for m in result.return_value], "it was trained again"


def test_fit_resumed_with_dropout_ends_as_if_undisturbed(cfg, monkeypatch):
    """The random state is restored: otherwise dropout draws other numbers in the resumed epoch."""

    def build_model_with_dropout(num_classes, image_size):
        model = build_model(num_classes, image_size)
        model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
        return model

    def train_loop(config):
        training.build_model = build_model_with_dropout
        if ray.train.get_checkpoint() is None and config["die_after"]:
            report = training.report_with_checkpoint

            def report_and_die(*args):
                report(*args)
                raise RuntimeError("dies on purpose")

            training.report_with_checkpoint = report_and_die
        else:
            training.report_with_checkpoint = original
        return training.train_loop_ray_train_ray_data(config)

    import ray.train

    original = training.report_with_checkpoint
    losses = []
    for die_after in (False, True):
        run = build_trainer(cfg, ScalingConfig(num_workers=1))
        run.datasets = {name: data.load(name, cfg) for name in ("train", "validation")}  # no augmentation
        run.train_loop_config["die_after"] = die_after
        run.train_loop_per_worker = train_loop
        run.run_config.failure_config = ray.train.FailureConfig(max_failures=1)
        losses.append([metrics["train_loss"] for metrics in run.fit().return_value])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "workers", "says"),
    [
        (33, 2, "33 images can't be shared evenly by 2 workers, 2 or more each: set TUTORIAL_BATCH_SIZE to 32"),
        (2, 2, "2 images can't be shared evenly by 2 workers, 2 or more each: set TUTORIAL_BATCH_SIZE to 4"),
        (1024, 2, "320 training images do not fill one batch of 1024"),
    ],
)
def test_check_batch_size_refuses_a_choice_that_does_not_fit(cfg, batch_size, workers, says):
    with pytest.raises(ValueError, match=says):
        check_batch_size(replace(cfg, batch_size=batch_size), workers, 320)


@pytest.mark.parametrize(
    ("workers", "images", "expected"),
    [(1, 1257, 64), (2, 1257, 64), (3, 1257, 63), (5, 1257, 60), (6, 1257, 60), (1, 100, 33), (2, 26, 8), (2, 5, 4)],
)
def test_check_batch_size_adjusts_the_default_and_says_so(workers, images, expected, capsys):
    assert check_batch_size(settings.Settings(), workers, images) == expected
    assert ("instead of 64" in capsys.readouterr().out) == (expected != 64)


def test_check_batch_size_keeps_64_when_the_learner_chose_it(monkeypatch):
    monkeypatch.setenv("TUTORIAL_BATCH_SIZE", "64")
    with pytest.raises(ValueError, match="64 images can't be shared .* by 3 workers, .*: set .*_BATCH_SIZE to 63"):
        check_batch_size(settings.load(), 3, 1257)


def test_build_trainer_refuses_too_many_workers_before_anything_starts(cfg):
    with pytest.raises(cluster.ClusterError, match="1000 workers need 1000 CPU, and this Ray has"):
        build_trainer(cfg, ScalingConfig(num_workers=1000))


def test_build_run_config_gives_unique_names(cfg):
    assert len({trainer.build_run_config(cfg).name for _ in range(20)}) == 20


@pytest.mark.parametrize(("image_size", "first_block"), [(32, 16), (63, 32), (64, 16), (224, 56)])
def test_build_model_suits_the_image_size(image_size, first_block):
    model = build_model(7, image_size).eval()
    images = torch.zeros(2, 3, image_size, image_size)
    assert model(images).shape == (2, 7)
    assert model.layer1(model.maxpool(model.relu(model.conv1(images)))).shape[-1] == first_block


def test_evaluation_is_saved_and_found_again(cfg, finished):
    _, result = finished
    evaluation.save(result, 0.75, 61, cfg)
    record = evaluation.latest(cfg)
    assert (record["accuracy"], record["num_images"], record["epochs"]) == (0.75, 61, 2)


def test_loop_of_lesson_03_with_your_own_dataloader_runs(tmp_path):
    """Two workers can't share 127 images evenly: one of them is trained on twice, and none of 61 is validated twice."""
    (lesson,) = NOTEBOOKS.glob("03_*.ipynb")
    texts = [cell.source for cell in nbformat.read(lesson, as_version=4).cells if cell.cell_type == "markdown"]
    (folded,) = [text for text in texts if "The loop with your own DataLoader" in text]
    (source,) = re.findall("```python\n(.*?)```", folded, re.DOTALL)

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(127) % 2
    images = torch.randn(127, 3, 32, 32, generator=generator) + 3 * labels[:, None, None, None]
    train_set, validation_set = TensorDataset(images, labels), TensorDataset(images[:61], labels[:61])

    scope = {**vars(training), "__name__": "own_loop", "build_model": build_model, "DataLoader": DataLoader}
    scope |= {"train_set": train_set, "validation_set": validation_set}
    exec(source, scope)
    config = {"num_epochs": 2, "global_batch_size": 32, "steps_per_epoch": 127 // 2 // 16, "learning_rate": 0.02}
    config |= {"seed": 0, "num_classes": 2, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    result = TorchTrainer(
        scope["train_loop_own_loader"],
        train_loop_config=config,
        scaling_config=TWO_WORKERS,
        run_config=RunConfig(storage_path=str(tmp_path)),
    ).fit()
    history = result.return_value
    assert [metrics["epoch"] for metrics in history] == [0, 1]
    assert history[-1]["train_accuracy"] > 0.9
    of_all = history[-1]["validation_accuracy"] * 61
    assert of_all == pytest.approx(round(of_all)), "an image was validated twice, or never"
