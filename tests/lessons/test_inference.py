"""Lesson 08's definitions: every image predicted once, as one process predicts it, and bad images refused."""

import contextlib
import os
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray
import torch

from helpers import data, evaluation, settings, trainer
from helpers.model import build_model
from helpers.preprocessing import image_ids, normalize_images
from support import load_definitions, make_image_folder

pytestmark = pytest.mark.usefixtures("shared_ray")
lesson = load_definitions("08")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (61, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
LABELS = RNG.integers(0, 3, 61)
CONFIG = {
    "num_classes": 3,
    "class_names": ["a", "b", "c"],
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.3, 0.2, 0.1],
}
GOOD = IMAGES[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained network, saved as the train loop saves one, whose predictions differ from image to image."""
    torch.manual_seed(0)
    model = build_model(3).train()
    for layer in model.modules():
        layer.momentum = 1.0  # batch normalisation keeps the statistics of the next call alone
    with torch.no_grad():
        logits = model(normalize_images(torch.from_numpy(IMAGES), CONFIG["mean"], CONFIG["std"]))
        model.fc.bias -= logits.mean(dim=0)
        model.fc.weight *= 4
        model.fc.bias *= 4
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save({"model": model.state_dict(), "config": CONFIG}, folder / "state.pt")
    return ray.train.Checkpoint(f"file://{folder}")


@pytest.fixture(scope="module")
def dataset(shared_ray):
    parts = [data.to_table(IMAGES[part], LABELS[part], CONFIG["class_names"]) for part in np.split(range(61), [20, 23])]
    return ray.data.from_arrow(parts)


@pytest.fixture(scope="module")
def expected(checkpoint, dataset):
    """The predictions of a single process by another way, by image id: label, predicted class, confidence."""
    model, config = evaluation.load_model(checkpoint)
    predictions = evaluation.predict(model, config, dataset)
    rows = zip(predictions["label"], predictions["probability"], strict=True)
    found = [(label, probability.argmax(), probability.max()) for label, probability in rows]
    predicted, confidence = zip(*[(row[1], row[2]) for row in found], strict=True)
    assert len(set(predicted)) > 1 and np.std(confidence) > 0.01, "the data don't tell predictions apart"
    return dict(zip(image_ids(predictions["image"]).tolist(), found, strict=True))


@pytest.fixture(scope="module")
def online(checkpoint):
    actor = ray.remote(lesson.OnlineClassifier).remote(checkpoint)
    yield actor
    ray.kill(actor)


def read(folder):
    return ray.data.read_parquet(folder).to_pandas()


def test_write_predictions_predicts_every_image_once(checkpoint, dataset, expected, tmp_path):
    folder = f"file://{tmp_path}/predictions"
    for size in (2, 1):  # the second time, only its own files may be there
        lesson.write_predictions(dataset, checkpoint, folder, size, {"num_cpus": 1})
        predictions = read(folder)
        assert set(predictions) == {"label", "image_id", "predicted", "confidence"}
        assert sorted(predictions["image_id"]) == sorted(expected)
        for row in predictions.itertuples():
            assert (row.label, row.predicted) == expected[row.image_id][:2]
            assert row.confidence == pytest.approx(expected[row.image_id][2], abs=1e-5)


def test_write_predictions_ends_its_processes(checkpoint, dataset, tmp_path, monkeypatch):
    class WithProcess(lesson.Classifier):
        def __call__(self, batch):
            return {**super().__call__(batch), "process": np.full(len(batch["label"]), os.getpid())}

    monkeypatch.setattr(lesson, "Classifier", WithProcess)
    lesson.write_predictions(dataset, checkpoint, str(tmp_path), 1, {"num_cpus": 1})
    processes = set(read(str(tmp_path))["process"])
    assert len(processes) == 1 and os.getpid() not in processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process).wait(timeout=30)


def test_write_predictions_replaces_old_ones(checkpoint, dataset, tmp_path):
    folder = str(tmp_path / "predictions")
    lesson.write_predictions(dataset, checkpoint, folder, 1, {"num_cpus": 1})
    lesson.write_predictions(dataset.limit(5), checkpoint, folder, 1, {"num_cpus": 1})
    assert len(read(folder)) == 5


def test_classifier_passes_other_columns_on_and_no_images(checkpoint):
    predictions = lesson.Classifier(checkpoint)({"image": IMAGES[:4], "id": np.arange(4)})
    assert set(predictions) == {"id", "predicted", "confidence"} and list(predictions["id"]) == [0, 1, 2, 3]
    assert predictions["predicted"].dtype == np.int64 and predictions["confidence"].dtype == np.float32


BAD = {
    "list": (GOOD.tolist(), "must be a NumPy array and this is a list: read or convert"),
    "file name": ("seven.png", "must be a NumPy array and this is a str"),
    "nothing": (None, "this is a NoneType"),
    "tensor": (torch.zeros(32, 32, 3), "this is a Tensor"),
    "channels first": (GOOD.transpose(2, 0, 1), "channels first: put them last with image.transpose"),
    "grey": (GOOD[:, :, 0], r"must be \(32, 32, 3\) and is \(32, 32\): resize the image, in RGB"),
    "large": (np.zeros((64, 64, 3), np.uint8), r"is \(64, 64, 3\)"),
    "a batch": (IMAGES[:2], r"is \(2, 32, 32, 3\)"),
    "empty": (np.zeros(0, np.uint8), r"is \(0,\)"),
    "float": (GOOD / 255, "dtype must be uint8, 0 to 255, and is float64: scale"),
    "objects": (GOOD.astype(object), "is object"),
}


@pytest.mark.parametrize("name", BAD)
def test_predict_one_refuses_a_bad_image_and_goes_on(online, name):
    before = lesson.predict_one(online, GOOD)
    image, says = BAD[name]
    with pytest.raises(ValueError, match=says) as caught:
        lesson.predict_one(online, image)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert lesson.predict_one(online, GOOD) == before


def test_predict_one_equals_the_pool(online, expected):
    for image, image_id in zip(IMAGES[:8], image_ids(IMAGES[:8]), strict=True):
        prediction = lesson.predict_one(online, image)
        _, predicted, confidence = expected[image_id]
        assert prediction["class"] == CONFIG["class_names"][predicted]
        assert prediction["confidence"] == pytest.approx(confidence, abs=1e-5)


def test_predict_one_raises_when_the_actor_is_gone(checkpoint):
    online = ray.remote(lesson.OnlineClassifier).remote(checkpoint)
    process = psutil.Process(lesson.predict_one(online, GOOD)["process"])
    ray.kill(online)
    with pytest.raises(ray.exceptions.RayActorError):
        lesson.predict_one(online, GOOD)
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Two easy classes, one short epoch, and storage behind a URI."""
    counts = {"train": 32, "validation": 5, "test": 7}
    folder = make_image_folder(tmp_path_factory.mktemp("data") / "images", counts)
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    return settings.Settings(data=str(folder), epochs=1, batch_size=16, storage=storage)


def test_trained_checkpoint_trains_only_when_none_is_kept(cfg, capsys, monkeypatch):
    checkpoint = evaluation.trained_checkpoint(cfg)
    assert "There is no trained checkpoint for images yet: training one first" in capsys.readouterr().out
    record = evaluation.latest(cfg)
    assert record["num_images"] == 14 and checkpoint.path.endswith(f"{record['run']}/{record['checkpoint']}")

    def no_more(*_):
        raise RuntimeError("it trains")

    monkeypatch.setattr(trainer, "build_trainer", no_more)
    assert evaluation.trained_checkpoint(cfg).path == checkpoint.path
    assert "training" not in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="it trains"):  # the same name, other images
        monkeypatch.setattr(data, "prepare", lambda _: "elsewhere/images-0123")
        evaluation.trained_checkpoint(cfg)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "build_trainer", no_more)
    checkpoint.filesystem.delete_file(f"{checkpoint.path}/state.pt")
    with pytest.raises(RuntimeError, match="it trains"):
        evaluation.trained_checkpoint(cfg)


def test_trained_checkpoint_trains_with_the_settings_that_were_given(cfg, monkeypatch, tmp_path):
    given = []

    def remember(cfg):
        given.append(cfg)
        raise RuntimeError("enough")

    monkeypatch.setattr(trainer, "build_trainer", remember)
    elsewhere = replace(cfg, storage=str(tmp_path))
    with pytest.raises(RuntimeError, match="enough"):
        evaluation.trained_checkpoint(elsewhere)
    assert given == [elsewhere]
