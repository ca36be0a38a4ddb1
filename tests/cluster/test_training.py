"""Training on several hosts: from images in a bucket, with misleading names, for two people, and when hosts vanish."""

import re
import sys
import time

import pytest

from cluster.on_hosts import notebook, python, started
from support import make_image_folder

pytestmark = pytest.mark.cluster
TRAIN = """
import sys

from ray.train import ScalingConfig

from helpers import cluster, faults
from helpers.progress import show_progress

cluster.connect()
workers, epochs = map(int, sys.argv[1:])
scaling = ScalingConfig(num_workers=workers, placement_strategy="SPREAD")
options = {"max_failures": 3, "scaling_config": scaling, "num_epochs": epochs}
trainer = faults.build_short_trainer(faults.unique_run_name(), **options)
with show_progress(trainer), cluster.suppress_ray_logs():
    history = trainer.fit().return_value
print("epochs", [metrics["epoch"] for metrics in history])
"""
PREPARE = """
import sys

import numpy as np

from helpers import cluster, data, preprocessing

cluster.connect()
for split in data.SPLITS:
    rows = data.load(split).take_all()
    ids = preprocessing.image_ids(np.stack([row["image"] for row in rows])).tolist()
    print(split, sorted(zip(ids, [row["label"] for row in rows])))
"""
UPLOAD = """
import sys

import pyarrow.fs

filesystem, path = pyarrow.fs.FileSystem.from_uri(sys.argv[2])
pyarrow.fs.copy_files(sys.argv[1], path, destination_filesystem=filesystem)
"""


def train(hosts, variables, workers=3, epochs=3):
    """Start a short training on the first host."""
    return hosts.start(1, [sys.executable, "-u", "-c", TRAIN, workers, epochs], **variables)


def finish(process, epochs):
    """Wait for a training and check that every epoch is in its history once."""
    printed = process.communicate(timeout=400)[0]
    assert f"epochs {list(range(epochs))}" in printed, printed[-3000:]


@pytest.fixture(scope="module")
def misled_hosts():
    yield from started(2, bucket=True, shared=False, loopback_names=True, token=False)


def test_training_does_without_names_a_folder_and_a_token(misled_hosts):
    finish(train(misled_hosts, notebook(misled_hosts, "bucket"), workers=2, epochs=2), epochs=2)


def test_training_of_two_people_at_the_same_time(hosts):
    variables = notebook(hosts, "folder")
    both = [
        train(hosts, {**variables, "TUTORIAL_STORAGE": f"{hosts.folder}/{person}"}, workers=1, epochs=2)
        for person in ("one", "another")
    ]
    for process in both:
        finish(process, epochs=2)


def test_images_in_a_bucket_are_those_of_the_folder(hosts, tmp_path):
    images = make_image_folder(tmp_path / "images", {"train": 24, "test": 7}, size=(20, 24), suffixes=("png", "jpg"))
    (images / "train" / "dark" / ".hidden.png").write_text("no image")
    (images / "train" / "dark" / "note.txt").write_text("no image")
    variables = notebook(hosts, "bucket")
    python(hosts, UPLOAD, images, f"{hosts.bucket}/images%20of%20mine", **variables)
    from_bucket = python(hosts, PREPARE, **variables, TUTORIAL_DATA=f"{hosts.bucket}/images%20of%20mine")
    from_folder = python(hosts, PREPARE, **notebook(hosts, "folder"), TUTORIAL_DATA=images)
    rows = re.compile(r"^(?:train|validation|test) .*$", re.MULTILINE)
    assert len(rows.findall(from_bucket)) == 3, from_bucket
    assert rows.findall(from_bucket) == rows.findall(from_folder)
    assert "1 × .txt file" in from_bucket and "1 × hidden or system file" in from_bucket


@pytest.mark.parametrize("fault", ["kill", "unplug"])
def test_training_outlives_a_host(hosts, fault):
    process = train(hosts, notebook(hosts, "folder"), epochs=6)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("epoch 2/"):
            break
    assert process.poll() is None, "".join(printed)[-3000:]
    getattr(hosts, fault)(3)
    start = time.monotonic()
    try:
        finish(process, epochs=6)
    finally:
        print(f"{fault}: all other epochs took {time.monotonic() - start:.0f} s")
        hosts.restart(3)
