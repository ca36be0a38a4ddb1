"""A checkpoint over a whole data set and for single pictures: complete, right, robust, and nothing left running."""

import contextlib
import os
import zlib
from dataclasses import replace

import numpy as np
import psutil
import pyarrow.fs
import pytest
import ray
import torch

from helpers import cluster, data, evaluation, inference, settings, trainer
from helpers.model import build_model
from helpers.preprocessing import normalize_images

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (61, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
LABELS = RNG.integers(0, 3, 61)
CONFIG = {"num_classes": 3, "class_names": ["a", "b", "c"], "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
GOOD = PICTURES[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained network, saved as the train loop saves one, whose answers differ from picture to picture."""
    torch.manual_seed(0)
    model = build_model(3).train()
    for layer in model.modules():
        layer.momentum = 1.0  # batch normalisation keeps the statistics of the next call alone
    with torch.no_grad():
        logits = model(normalize_images(torch.from_numpy(PICTURES), CONFIG["mean"], CONFIG["std"]))
        model.fc.bias -= logits.mean(dim=0)
        model.fc.weight *= 4
        model.fc.bias *= 4
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save({"model": model.state_dict(), "config": CONFIG}, folder / "state.pt")
    return ray.train.Checkpoint(f"file://{folder}")


@pytest.fixture(scope="module")
def dataset():
    parts = [
        data.to_table(PICTURES[part], LABELS[part], CONFIG["class_names"]) for part in np.split(range(61), [20, 23])
    ]
    return ray.data.from_arrow(parts)


@pytest.fixture(scope="module")
def expected(checkpoint, dataset):
    """The answers of a single process by another way, by fingerprint: label, predicted class, confidence."""
    model, config = evaluation.load_model(checkpoint)
    answers = evaluation.predict(model, config, dataset)
    return {
        zlib.crc32(image.tobytes()): (label, probability.argmax(), probability.max())
        for image, label, probability in zip(answers["image"], answers["label"], answers["probability"], strict=True)
    }


@pytest.fixture(scope="module")
def service(checkpoint):
    actor = ray.remote(inference.PictureService).remote(checkpoint)
    yield actor
    ray.kill(actor)


def parquet_files(folder):
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    return {file.path for file in filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True)) if file.size}


def test_the_data_tell_answers_apart(expected):
    predicted, confidence = zip(*[(answer[1], answer[2]) for answer in expected.values()], strict=True)
    assert len(expected) == 61 and len(set(predicted)) > 1 and np.std(confidence) > 0.01


def test_a_pool_answers_every_picture_once_as_a_single_process_does(checkpoint, dataset, expected, tmp_path):
    folder = f"file://{tmp_path}/predictions"
    for size in (2, 1):  # the second time, only its own files may be there
        inference.write_predictions(dataset, checkpoint, folder, size, {"num_cpus": 1})
        answers = inference.read_predictions(folder)
        assert set(answers) == {"label", "picture", "predicted", "confidence"}
        assert sorted(answers["picture"]) == sorted(expected)
        for picture, label, predicted, confidence in zip(
            *(answers[name] for name in ("picture", "label", "predicted", "confidence")), strict=True
        ):
            assert (label, predicted) == expected[picture][:2]
            assert confidence == pytest.approx(expected[picture][2], abs=1e-5)


def test_the_pool_s_processes_end_with_their_work(checkpoint, dataset, tmp_path, monkeypatch):
    class Witness(inference.Classifier):
        def __call__(self, batch):
            return {**super().__call__(batch), "process": np.full(len(batch["label"]), os.getpid())}

    monkeypatch.setattr(inference, "Classifier", Witness)
    inference.write_predictions(dataset, checkpoint, str(tmp_path), 1, {"num_cpus": 1})
    processes = set(inference.read_predictions(str(tmp_path))["process"])
    assert len(processes) == 1 and os.getpid() not in processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process).wait(timeout=30)


def test_what_lay_there_is_replaced(checkpoint, dataset, tmp_path):
    folder = str(tmp_path / "predictions")
    inference.write_predictions(dataset, checkpoint, folder, 1, {"num_cpus": 1})
    first = parquet_files(folder)
    inference.write_predictions(dataset.limit(5), checkpoint, folder, 1, {"num_cpus": 1})
    assert first and not first & parquet_files(folder)
    assert len(inference.read_predictions(folder)["label"]) == 5


def test_other_columns_pass_through_and_pictures_do_not(checkpoint):
    answers = inference.Classifier(checkpoint)({"image": PICTURES[:4], "id": np.arange(4)})
    assert set(answers) == {"id", "predicted", "confidence"} and list(answers["id"]) == [0, 1, 2, 3]
    assert answers["predicted"].dtype == np.int64 and answers["confidence"].dtype == np.float32


BAD = {
    "list": (GOOD.tolist(), "must be a NumPy array and this is a list: read or convert"),
    "file name": ("seven.png", "must be a NumPy array and this is a str"),
    "nothing": (None, "this is a NoneType"),
    "tensor": (torch.zeros(32, 32, 3), "this is a Tensor"),
    "channels first": (GOOD.transpose(2, 0, 1), "channels first: put them last with picture.transpose"),
    "grey": (GOOD[:, :, 0], r"must be \(32, 32, 3\) and is \(32, 32\): resize the picture, in RGB"),
    "large": (np.zeros((64, 64, 3), np.uint8), r"is \(64, 64, 3\)"),
    "a batch": (PICTURES[:2], r"is \(2, 32, 32, 3\)"),
    "empty": (np.zeros(0, np.uint8), r"is \(0,\)"),
    "float": (GOOD / 255, "dtype must be uint8, 0 to 255, and is float64: scale"),
    "objects": (GOOD.astype(object), "is object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_in_a_sentence_and_the_next_one_answered(service, name):
    before = inference.ask(service, GOOD)
    picture, says = BAD[name]
    with pytest.raises(ValueError, match=says) as caught:
        inference.ask(service, picture)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert inference.ask(service, GOOD) == before


def test_single_answers_equal_those_of_the_pool(service, expected):
    for picture in PICTURES[:8]:
        answer = inference.ask(service, picture)
        _, predicted, confidence = expected[zlib.crc32(picture.tobytes())]
        assert answer["class"] == CONFIG["class_names"][predicted]
        assert answer["confidence"] == pytest.approx(confidence, abs=1e-5)


def test_a_service_that_was_ended_answers_no_more(checkpoint):
    service = ray.remote(inference.PictureService).remote(checkpoint)
    process = psutil.Process(inference.ask(service, GOOD)["process"])
    ray.kill(service)
    with pytest.raises(ray.exceptions.RayActorError):
        inference.ask(service, GOOD)
    process.wait(timeout=30)


@pytest.mark.parametrize(("resources", "expected_pool"), [
    ({"CPU": 64.0, "GPU": 3.0}, (3, {"num_gpus": 1})),
    ({"CPU": 64.0}, (2, {"num_cpus": 4})),
])  # fmt: skip
def test_the_pool_suits_what_ray_has(monkeypatch, resources, expected_pool):
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "available_resources", lambda: resources)
    monkeypatch.setattr(cluster, "cores", lambda: 8)
    assert cluster.actor_pool(settings.Settings(workers=0 if "GPU" in resources else 2)) == expected_pool


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Two easy classes, one short epoch, and storage behind a URI."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("chosen") / "pictures"
    for split, count in (("train", 32), ("test", 7)):
        for name, mean in (("dark", 60), ("light", 190)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = RNG.normal(mean, 25, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    return settings.Settings(data=str(folder), epochs=1, batch_size=16, storage=storage)


def test_a_network_is_trained_when_none_is_kept_and_only_then(chosen, capsys, monkeypatch):
    checkpoint = evaluation.trained_checkpoint(chosen)
    assert "No network trained on pictures is kept yet: training one first" in capsys.readouterr().out
    record = evaluation.latest(chosen)
    assert record["pictures"] == 14 and checkpoint.path.endswith(f"{record['run']}/{record['checkpoint']}")

    folder = chosen.path("runs", record["run"], "predictions")
    inference.write_predictions(data.load("test", chosen), checkpoint, folder, 1, {"num_cpus": 1})
    answers = inference.read_predictions(folder)
    assert np.mean(answers["predicted"] == answers["label"]) == pytest.approx(record["accuracy"])

    def no_more(*_):
        raise RuntimeError("it trains")

    monkeypatch.setattr(trainer, "build_trainer", no_more)
    assert evaluation.trained_checkpoint(chosen).path == checkpoint.path
    assert "training" not in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="it trains"):  # the same name, other pictures
        monkeypatch.setattr(data, "prepare", lambda _: "elsewhere/pictures-0123")
        evaluation.trained_checkpoint(chosen)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "build_trainer", no_more)
    checkpoint.filesystem.delete_file(f"{checkpoint.path}/state.pt")
    with pytest.raises(RuntimeError, match="it trains"):
        evaluation.trained_checkpoint(chosen)


def test_training_uses_the_settings_that_were_given(chosen, monkeypatch, tmp_path):
    asked = []

    def remember(given):
        asked.append(given)
        raise RuntimeError("enough")

    monkeypatch.setattr(trainer, "build_trainer", remember)
    elsewhere = replace(chosen, storage=str(tmp_path))
    with pytest.raises(RuntimeError, match="enough"):
        evaluation.trained_checkpoint(elsewhere)
    assert asked == [elsewhere]
