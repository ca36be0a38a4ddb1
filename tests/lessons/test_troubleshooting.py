"""The troubleshooting page lists errors that really happen: each entry's words are provoked here."""

import re
import shutil
import time
import types
from dataclasses import replace

import pytest
from ray.exceptions import AuthenticationError
from ray.train import ScalingConfig

import serving
from helpers import _sources, cluster, data, settings, trainer, tuning
from support import NOTEBOOKS

PAGE = (NOTEBOOKS / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
NOTEBOOK_ONLY = "No module named 'helpers'"  # Python's own words, where helpers is not installed


@pytest.fixture
def cfg(tmp_path):
    return settings.Settings(storage=str(tmp_path / "storage"))


def no_ray(cfg, folder, monkeypatch):
    cluster._join("127.0.0.1:9")


def too_long_a_path(cfg, folder, monkeypatch):
    def refuse(**_):
        raise OSError("AF_UNIX path length cannot exceed 107 bytes")

    monkeypatch.setattr(cluster.ray, "init", refuse)  # Ray runs already, and starts only once in a process
    cluster._start()


def no_address_here(cfg, folder, monkeypatch):
    serving.address("an-application-of-nobody")


def too_many_workers(cfg, folder, monkeypatch):
    cluster.require_resources(ScalingConfig(num_workers=1000))


def no_cpu_for_data_tasks(cfg, folder, monkeypatch):
    half = cluster.ray.cluster_resources()["CPU"] / 2
    cluster.require_resources(ScalingConfig(num_workers=2, resources_per_worker={"CPU": half}))


def all_cpus_taken(cfg, folder, monkeypatch):
    monkeypatch.setattr(cluster.ray, "available_resources", dict)
    cluster.require_resources(ScalingConfig(num_workers=1), seconds=0)


def a_folder_of_this_machine(cfg, folder, monkeypatch):
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    monkeypatch.setattr(cluster, "_ask_machines", lambda question: {"host2": "can't see the storage folder"})
    cluster.require_shared_storage(str(folder))


def a_bucket_without_permission(cfg, folder, monkeypatch):
    (folder / "file").touch()
    cluster.require_shared_storage(f"file://{folder}/file/below")


def a_machine_that_is_gone(cfg, folder, monkeypatch):
    cluster._ask_machines(lambda: time.sleep(3), seconds=0)


def no_token(cfg, folder, monkeypatch):
    refuse_to_join(monkeypatch, AuthenticationError("Invalid token"))


def another_ray(cfg, folder, monkeypatch):
    there, here = ("    Ray: 2.61.0\n    Python: 3.11.2\n", "    Ray: 2.60.0\n    Python: 3.12.1\n")
    words = f"The cluster was started with:\n{there}This process was started with:\n{here}"
    refuse_to_join(monkeypatch, RuntimeError(f"Version mismatch: {words}"))


def another_torch(cfg, folder, monkeypatch):
    monkeypatch.setattr(cluster, "_ask_machines", lambda question: {"host2": "2.0.0"})
    cluster._require_same_torch()


def refuse_to_join(monkeypatch, error):
    def refuse(**_):
        raise error

    monkeypatch.setattr(cluster.ray, "init", refuse)  # Ray runs already, and starts only once in a process
    cluster._join("auto")


def truncated_archive(cfg, folder, monkeypatch):
    archive = folder / "cifar-10-python.tar.gz"
    archive.write_bytes(b"the first part")
    _sources.cifar10(replace(cfg, data="cifar10", cifar10_archive=str(archive)))


def no_network(cfg, folder, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    _sources.cifar10(replace(cfg, data="cifar10"))


def a_bucket_that_is_not_there(cfg, folder, monkeypatch):
    data.prepare(replace(cfg, data=f"file://{folder}/nowhere"))


def no_train_folder(cfg, folder, monkeypatch):
    (folder / "train").rename(folder / "validation")
    data.prepare(replace(cfg, data=str(folder)))


def images_without_classes(cfg, folder, monkeypatch):
    data.prepare(replace(cfg, data=str(folder / "train" / "dark")))


def one_class(cfg, folder, monkeypatch):
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "light")
    data.prepare(replace(cfg, data=str(folder)))


def a_data_set_inside_a_class(cfg, folder, monkeypatch):
    shutil.copytree(folder, folder.parent / "outside" / "images")
    data.prepare(replace(cfg, data=str(folder.parent / "outside")))


def a_class_without_training_images(cfg, folder, monkeypatch):
    (folder / "test" / "dark").rename(folder / "test" / "grey")
    data.prepare(replace(cfg, data=str(folder)))


def empty_class(cfg, folder, monkeypatch):
    (folder / "train" / "empty").mkdir()
    data.prepare(replace(cfg, data=str(folder)))


def circle_of_links(cfg, folder, monkeypatch):
    (folder / "train" / "dark" / "back").symlink_to(folder / "train")
    data.prepare(replace(cfg, data=str(folder)))


def damaged_image(cfg, folder, monkeypatch):
    (folder / "train" / "dark" / "000.png").write_bytes(b"no image")
    data.prepare(replace(cfg, data=str(folder)))


def damaged_class(cfg, folder, monkeypatch):
    for image in (folder / "train" / "dark").iterdir():
        image.write_bytes(b"no image")
    data.prepare(replace(cfg, data=str(folder), on_bad_image="skip"))


def too_few_different_images(cfg, folder, monkeypatch):
    shutil.rmtree(folder / "test")
    first, *others = sorted((folder / "train" / "dark").iterdir())
    for image in others:
        image.unlink()
    data.prepare(replace(cfg, data=str(folder)))


def too_few_images(cfg, folder, monkeypatch):
    trainer.check_batch_size(replace(cfg, batch_size=100), num_workers=1, num_images=48)


def uneven_shares(cfg, folder, monkeypatch):
    trainer.check_batch_size(replace(cfg, batch_size=100), num_workers=3, num_images=1440)


def a_trial_that_fails(cfg, folder, monkeypatch):
    failed = types.SimpleNamespace(error=RuntimeError("out of memory"), config={"batch_size": 8}, metrics={})
    tuning.require_success([failed], 1, 2)


def misspelt_setting(cfg, folder, monkeypatch):
    settings.choose(epoch=3)


def bad_value(cfg, folder, monkeypatch):
    settings.choose(epochs=0)


def storage_that_can_not_be_written(cfg, folder, monkeypatch):
    (folder / "file").touch()
    settings.require_writable(replace(cfg, storage=str(folder / "file")))


def choices_that_can_not_be_saved(cfg, folder, monkeypatch):
    monkeypatch.setattr(settings, "SAVED_CHOICES", folder / "settings.json" / "below-a-file.json")
    (folder / "settings.json").touch()
    settings.choose(epochs=3)


def damaged_choices(cfg, folder, monkeypatch):
    monkeypatch.setattr(settings, "SAVED_CHOICES", folder / "settings.json")
    (folder / "settings.json").write_text("{")
    settings.load()


PROVOKED = {
    "No Ray answers at RAY_ADDRESS=": no_ray,
    "Ray's sockets don't fit into the long path of the temporary folder": too_long_a_path,
    "workers need … and this Ray has": too_many_workers,
    "and leave none for the tasks that read their data": no_cpu_for_data_tasks,
    "are free: let the other lesson finish or shut down its kernel": all_cpus_taken,
    "can't see the storage folder": a_folder_of_this_machine,
    "can't write (…) to the storage": a_bucket_without_permission,
    "belongs to this Ray and does not answer": a_machine_that_is_gone,
    "wants a token, and this notebook has none or another": no_token,
    "The cluster runs Ray … and this notebook Ray": another_ray,
    "has torch … and this one": another_torch,
    "No port of this machine leads to": no_address_here,
    "is not the whole archive": truncated_archive,
    "CIFAR-10 could not be downloaded": no_network,
    "The images in … can't be listed": a_bucket_that_is_not_there,
    "has no folder train/": no_train_folder,
    "has no class folders: sort its images into": images_without_classes,
    "has one class, … and needs two": one_class,
    "has a folder train/: set TUTORIAL_DATA to it": a_data_set_inside_a_class,
    "has the class … and train has not": a_class_without_training_images,
    "holds no image that Pillow reads": empty_class,
    "leads back to a folder that it is in": circle_of_links,
    "Set TUTORIAL_ON_BAD_IMAGE=skip to leave them out": damaged_image,
    "No image of the class … can be read": damaged_class,
    "too few different images to draw some for": too_few_different_images,
    "training images do not fill one batch of": too_few_images,
    "can't be shared evenly by": uneven_shares,
    "The trial with … failed": a_trial_that_fails,
    "There is no setting": misspelt_setting,
    "can't be … : use": bad_value,
    "The storage folder … can't be written": storage_that_can_not_be_written,
    "The choices can't be saved in": choices_that_can_not_be_saved,
    "The saved choices in … can't be read": damaged_choices,
}


def test_troubleshooting_quotes_only_errors_that_are_provoked_here():
    assert set(QUOTED) - {NOTEBOOK_ONLY} == set(PROVOKED)


@pytest.mark.parametrize("words", PROVOKED)
def test_troubleshooting_quotes_the_program(words, cfg, image_folder, monkeypatch, shared_ray):
    pattern = ".*".join(re.escape(part.strip()) for part in words.split("…"))
    with pytest.raises((ValueError, RuntimeError), match=pattern):
        PROVOKED[words](cfg, image_folder, monkeypatch)
