"""Lesson 12's definitions: files predicted once each, also after a kill, and served over HTTP under load and faults."""

import contextlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.fs
import pytest
import ray
import requests
import torch
from PIL import Image
from ray import serve

import serving
from helpers import data, evaluation, settings, trainer
from helpers.model import build_model
from helpers.preprocessing import image_ids, normalize_images
from support import NOTEBOOKS, load_definitions, make_image_folder, ray_processes, wait_for

pytestmark = pytest.mark.usefixtures("shared_ray")
lesson = load_definitions("12", image_size=32)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (61, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
CONFIG = {
    "num_classes": 3,
    "class_names": ["a", "b", "c"],
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.3, 0.2, 0.1],
}
JPEGS = [lesson.encode(image, "JPEG") for image in IMAGES]
HALF = JPEGS[0][: len(JPEGS[0]) // 2]


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
    found = ray.train.Checkpoint(f"file://{folder}")
    lesson.__dict__.update(checkpoint=found, size=2, resources={"num_cpus": 0.5})
    return found


def predict(checkpoint, images):
    """Class indices and confidences, one image at a time and by another way than the lesson's."""
    model, config = evaluation.load_model(checkpoint)
    with torch.no_grad():
        pixels = [normalize_images(torch.tensor(image[None]), config["mean"], config["std"]) for image in images]
        probabilities = torch.cat([model(image).softmax(dim=1) for image in pixels]).numpy()
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    assert len(set(predicted)) > 1 and np.std(confidence) > 0.01, "the data don't tell predictions apart"
    return predicted, confidence


@pytest.fixture(scope="module")
def inbox(tmp_path_factory):
    path = tmp_path_factory.mktemp("inference")
    folder = path / "inbox"
    folder.mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    whole = (folder / "030.png").read_bytes()
    (folder / "030x.png").write_bytes(whole[: len(whole) // 2])
    lesson.__dict__.update(path=str(path), filesystem=pyarrow.fs.LocalFileSystem(), num_files=len(IMAGES) + 1)
    return folder


def read(folder):
    return ray.data.read_parquet(folder).to_pandas().sort_values("path", ignore_index=True)


def test_write_predictions_predicts_each_file_once_and_names_the_damaged_one(checkpoint, inbox, tmp_path):
    lesson.write_predictions(lesson.read_files(), f"file://{tmp_path}/predictions", batch_size=7)
    table = read(f"file://{tmp_path}/predictions")
    assert [Path(path).name for path in table["path"]] == sorted(os.listdir(inbox))
    is_damaged = table["error"] != ""
    assert [Path(path).name for path in table["path"][is_damaged]] == ["030x.png"]
    assert table["error"][is_damaged].item().startswith("These bytes are no image")
    good, (predicted, confidence) = table[~is_damaged], predict(checkpoint, IMAGES)
    assert good["predicted"].tolist() == predicted.tolist() and table["predicted"][is_damaged].item() == -1
    assert good["confidence"].to_numpy() == pytest.approx(confidence, abs=1e-5)
    assert good["image_id"].tolist() == image_ids(IMAGES).tolist()


def test_write_predictions_ends_its_processes(checkpoint, inbox, tmp_path):
    class WithProcess(lesson.Classifier):
        def __call__(self, batch):
            return {**super().__call__(batch), "process": np.full(len(batch["path"]), os.getpid())}

    lesson.write_predictions(lesson.read_files(), str(tmp_path), WithProcess)
    processes = set(read(str(tmp_path))["process"])
    assert 1 <= len(processes) <= 2 and os.getpid() not in processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process).wait(timeout=30)


def test_run_job_that_was_killed_predicts_each_file_exactly_once(checkpoint, inbox, tmp_path):
    lesson.__dict__.update(storage=str(tmp_path), last_file=f"{inbox}/060.png")
    output = f"{tmp_path}/killed"
    killed = lesson.run_job.remote(lesson.HangingClassifier)

    def is_block_committed():
        return any(".pending" not in file.name for file in tmp_path.glob("finished/*.parquet"))

    wait_for(is_block_committed, "no block was committed")
    ray.cancel(killed, force=True)
    with pytest.raises((ray.exceptions.WorkerCrashedError, ray.exceptions.TaskCancelledError)):
        ray.get(killed)
    before = read(output)["path"].tolist()
    ray.get(lesson.run_job.remote(lesson.Classifier))
    after = read(output)["path"].tolist()
    assert 0 < len(before) < len(after) and set(before) < set(after)
    assert [Path(path).name for path in after] == sorted(os.listdir(inbox))


@pytest.mark.parametrize("content", [b"", b"seven", HALF, JPEGS[0][:20], b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_decode_image_refuses_what_is_no_image(content):
    with pytest.raises(ValueError, match="no image that can be decoded: send a whole JPEG or PNG file"):
        evaluation.decode_image(content, 32)


def test_decode_image_equals_the_training_pipeline(tmp_path):
    file = tmp_path / "image.png"
    Image.fromarray(IMAGES[0][:, :24]).resize((48, 64)).save(file)
    by_training, _, refused = data._sources.decode([str(file)], 32)
    assert not refused and np.array_equal(evaluation.decode_image(file.read_bytes(), 32), by_training[0])
    assert np.array_equal(evaluation.decode_image(lesson.encode(IMAGES[0], "PNG"), 32), IMAGES[0])


@pytest.fixture(scope="module")
def online(checkpoint):
    """The lesson's deployment behind HTTP: its URL and its handle. Stopped, it leaves neither a port nor a process."""
    name = serving.start()
    deployment = lesson.OnlineClassifier.options(ray_actor_options={"num_cpus": 0.5})
    handle = serve.run(deployment.bind(checkpoint), name=name, route_prefix=f"/{name}")
    url = serving.address(name)
    yield url, handle
    serving.stop(name)
    with pytest.raises(requests.ConnectionError):
        requests.get(url)
    wait_for(lambda: not any("Serve" in " ".join(process.info["cmdline"]) for process in ray_processes()))


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Class and confidence of each JPEG."""
    predicted, confidence = predict(checkpoint, [evaluation.decode_image(jpeg, 32) for jpeg in JPEGS])
    return [CONFIG["class_names"][index] for index in predicted], confidence


def test_online_classifier_answers_right_and_refuses_bad_input_under_load(online, expected):
    """200 requests, 16 at a time, every twentieth a bad one."""
    url, _ = online
    numbers = [None if n % 20 == 7 else n % len(JPEGS) for n in range(200)]
    sent = lesson.send(url, [HALF if number is None else JPEGS[number] for number in numbers], 16)
    for number, (_, response) in zip(numbers, sent, strict=True):
        if number is None:
            assert response.status_code == 400 and response.json()["error"].startswith("These bytes are no image")
        else:
            assert response.status_code == 200 and response.json()["class"] == expected[0][number]
            assert response.json()["confidence"] == pytest.approx(expected[1][number], abs=1e-4)
    good = [response.json() for _, response in sent if response.ok]
    assert len({answer["process"] for answer in good}) == 2, "one replica did all the work"
    assert 1 < max(answer["batch"] for answer in good) <= 16


def test_online_classifier_answers_its_handle_as_it_answers_http(online, expected):
    _, handle = online
    answers = [handle.predict.remote(evaluation.decode_image(jpeg, 32)) for jpeg in JPEGS]
    assert [answer.result()["class"] for answer in answers] == expected[0]


@pytest.mark.parametrize("body", [b"", b"seven", HALF, b"\0" * 100_000])
def test_online_classifier_refuses_with_a_sentence(online, body):
    response = requests.post(online[0], data=body)
    assert response.status_code == 400 and response.json()["error"].endswith(".")
    assert requests.get(online[0]).status_code == 400
    assert requests.post(online[0], data=JPEGS[0]).ok


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_online_classifier_answers_curl(online, expected, tmp_path):
    (tmp_path / "image.jpg").write_bytes(JPEGS[3])
    command = ["curl", "-s", "--data-binary", f"@{tmp_path}/image.jpg", online[0]]
    assert f'"class":"{expected[0][3]}"' in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="a user may not list all connections there")
def test_online_classifier_listens_on_loopback_only(online):
    port = int(online[0].split(":")[2].split("/")[0])
    here = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    assert here and {connection.laddr.ip for connection in here} == {"127.0.0.1"}


@pytest.mark.skipif(sys.platform == "darwin", reason="a user may not list all connections there")
def test_rays_own_servers_want_a_token(online):
    """What the lesson says of the agent, which listens on this machine's network address as well."""
    children = psutil.Process().children(recursive=True)
    agents = {process.pid for process in children if "DashboardAgent" in " ".join(process.cmdline())}
    node = ray.nodes()[0]["NodeManagerAddress"]
    found = [c.laddr for c in psutil.net_connections("tcp") if c.pid in agents and c.status == psutil.CONN_LISTEN]
    urls = [f"http://{place.ip}:{place.port}/api/serve/applications/" for place in found if place.ip == node]
    assert urls and {requests.get(url).status_code for url in urls} == {401}
    open_ports = [place.port for place in found if place.ip == "0.0.0.0"]
    pages = [requests.get(f"http://127.0.0.1:{port}/metrics").text for port in open_ports]
    assert pages and all(page.startswith("# HELP") for page in pages), "open to everyone, and no page of metrics"


def test_online_classifier_loses_no_request_when_a_replica_dies(online, expected):
    url, handle = online
    with ThreadPoolExecutor(1) as background:
        load = background.submit(lesson.send, url, JPEGS[:1] * 200, 8)
        handle.die.remote()
        sent = load.result()
    assert any(response.raw.retries.history for _, response in sent), "no request met the replica that died"
    assert [response.status_code for _, response in sent] == [200] * 200
    assert {response.json()["class"] for _, response in sent} == {expected[0][0]}
    both = lambda: len({response.json()["process"] for _, response in lesson.send(url, JPEGS[:1] * 16, 8)}) == 2  # noqa: E731
    wait_for(both, "the replica was not replaced")


SEARCH = """
import sys
import numpy as np
from ray import tune
from helpers import cluster, settings
from support import load_definitions
cluster.connect()
cfg = settings.Settings(storage=sys.argv[1])
lesson = load_definitions("13", cfg=cfg, at_once=2, mean=[0.5] * 3, std=[0.2] * 3, num_classes=2)
images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
batch = {"image": images, "label": np.arange(64) % 2}
trial = tune.with_parameters(lesson.train_trial, train=batch, validation=batch, num_epochs=8)
space = {"learning_rate": tune.loguniform(1e-3, 1), "batch_size": 16, "seed": 1}
results = lesson.build_tuner(tune.with_resources(trial, {"CPU": 1}), space, "search", [], num_samples=6).fit()
print([result.metrics["training_iteration"] for result in results])
"""


def test_online_classifier_answers_while_another_lesson_searches(online, expected, tmp_path):
    """Two lessons share a Ray: lesson 13 searches in another process, and no answer is wrong meanwhile."""
    folders = os.pathsep.join(str(settings.PROJECT / name) for name in ("notebooks", "tests"))
    environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": folders}
    how = {"capture_output": True, "text": True, "env": os.environ | environment, "cwd": settings.PROJECT}
    with ThreadPoolExecutor(1) as background:
        search = background.submit(subprocess.run, [sys.executable, "-c", SEARCH, str(tmp_path)], **how)
        rounds = 0
        while not search.done():
            sent = lesson.send(online[0], JPEGS, 8)
            assert [response.json()["class"] for _, response in sent] == expected[0]
            rounds += 1
    assert search.result().stdout.splitlines()[-1:] == [str([8] * 6)], search.result().stderr
    assert rounds > 1


OTHER_NOTEBOOK = """
import os, sys
from ray import serve
import serving
from helpers import cluster
cluster.connect()
name = serving.start()
serve.run(serve.deployment(lambda request: "other").options(ray_actor_options={"num_cpus": 0}).bind(),
          name=name, route_prefix=f"/{name}")
print(serving.address(name), flush=True)
if sys.argv[1] == "die":
    os._exit(1)
serving.stop(name)
"""


@pytest.mark.parametrize("end", ["stop", "die"])
def test_serving_lets_two_notebooks_share_a_ray(online, end):
    """The other joins, is found at its address, and leaves or dies; this one's application goes on."""
    command = [sys.executable, "-c", OTHER_NOTEBOOK, end]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=NOTEBOOKS)
    other = result.stdout.strip().splitlines()[-1]
    assert other.rpartition("/")[0] == online[0].rpartition("/")[0] and other != online[0], result.stderr
    assert requests.post(online[0], data=JPEGS[0]).ok
    assert requests.get(other).ok == (end == "die")
    serving.delete_orphans()
    assert requests.get(other).status_code == 404
    assert requests.post(online[0], data=JPEGS[0]).ok


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
