"""The troubleshooting page speaks of errors that really happen: each entry's words are provoked here."""

import contextlib
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import ray.data
from ray.train import ScalingConfig

from helpers import cluster, data, settings, sources, splitting, trainer, tuning

PAGE = (settings.PROJECT / "notebooks" / "TROUBLESHOOTING.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
NOTEBOOK_ONLY = "No module named 'helpers'"  # Python's own words, where helpers is not installed


@pytest.fixture
def chosen(tmp_path):
    return settings.Settings(storage=str(tmp_path / "storage"))


def no_ray(chosen, folder, monkeypatch):
    cluster._join("127.0.0.1:9")


def too_many_workers(chosen, folder, monkeypatch):
    cluster.require(ScalingConfig(num_workers=1000))


def all_cpus_taken(chosen, folder, monkeypatch):
    monkeypatch.setattr(cluster.ray, "available_resources", dict)
    cluster.require(ScalingConfig(num_workers=1), seconds=0)


def a_folder_of_this_machine(chosen, folder, monkeypatch):
    hidden = contextlib.nullcontext(types.SimpleNamespace(name=str(folder / "seen-by-nobody")))
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    monkeypatch.setattr(cluster.tempfile, "NamedTemporaryFile", lambda **_: hidden)
    cluster.require_shared(str(folder))


def truncated_archive(chosen, folder, monkeypatch):
    archive = folder / "cifar-10-python.tar.gz"
    archive.write_bytes(b"the first part")
    sources.cifar10(replace(chosen, data="cifar10", cifar10_archive=str(archive)))


def no_network(chosen, folder, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    sources.cifar10(replace(chosen, data="cifar10"))


def no_train_folder(chosen, folder, monkeypatch):
    data.prepare(replace(chosen, data=str(folder / "train")))


def empty_class(chosen, folder, monkeypatch):
    (folder / "train" / "empty").mkdir()
    data.prepare(replace(chosen, data=str(folder)))


def damaged_picture(chosen, folder, monkeypatch):
    (folder / "train" / "dark" / "000.png").write_bytes(b"no picture")
    data.prepare(replace(chosen, data=str(folder)))


def too_few_pictures(chosen, folder, monkeypatch):
    train_ds = data.load("train", replace(chosen, data=str(folder)))
    trainer.build_train_loop_config(train_ds, ["dark", "light"], 1, chosen)


def misspelt_setting(chosen, folder, monkeypatch):
    settings.choose(epoch=3)


def bad_value(chosen, folder, monkeypatch):
    settings.choose(epochs=0)


def storage_that_can_not_be_written(chosen, folder, monkeypatch):
    (folder / "file").touch()
    settings.require_writable(replace(chosen, storage=str(folder / "file")))


def damaged_choices(chosen, folder, monkeypatch):
    monkeypatch.setattr(settings, "SAVED_CHOICES", folder / "settings.json")
    (folder / "settings.json").write_text("{")
    settings.load()


def too_large_a_trial(chosen, folder, monkeypatch):
    tuning.plan_trials(4, replace(chosen, workers=1000))


def one_picture_to_split(chosen, folder, monkeypatch):
    one = ray.data.from_items([{"image": np.zeros((4, 4, 3), np.uint8), "label": 0}])
    splitting.train_validation_split(one, pictures=768, seed=1)


def a_trial_that_fails(chosen, folder, monkeypatch):
    failed = types.SimpleNamespace(error=RuntimeError("no room"), config={"batch_size": 8}, metrics={})
    tuning.require_success([failed], 1)


PROVOKED = {
    "One trial needs … and this Ray has": too_large_a_trial,
    "training pictures are too few to hold some of them out": one_picture_to_split,
    "The trial with … failed": a_trial_that_fails,
    "No Ray answers at RAY_ADDRESS=": no_ray,
    "workers need … and this Ray has": too_many_workers,
    "are free: let the other lesson finish or shut down its kernel": all_cpus_taken,
    "can't see the storage folder": a_folder_of_this_machine,
    "is not the whole CIFAR-10 archive": truncated_archive,
    "CIFAR-10 could not be downloaded": no_network,
    "has no folder train/": no_train_folder,
    "holds no picture (jpg, jpeg or png)": empty_class,
    "can't be decoded": damaged_picture,
    "training pictures do not fill one batch of": too_few_pictures,
    "There is no setting": misspelt_setting,
    "can't be … : use": bad_value,
    "The storage folder … can't be written": storage_that_can_not_be_written,
    "The saved choices in … can't be read": damaged_choices,
}


def test_every_quoted_error_is_provoked():
    assert set(QUOTED) - {NOTEBOOK_ONLY} == set(PROVOKED)


@pytest.mark.parametrize("words", PROVOKED)
def test_the_words_are_those_of_the_program(words, chosen, folder_of_pictures, monkeypatch):
    pattern = ".*".join(re.escape(part.strip()) for part in words.split("…"))
    with pytest.raises((ValueError, RuntimeError), match=pattern):
        PROVOKED[words](chosen, folder_of_pictures, monkeypatch)
