"""Every source becomes the same Parquet layout, and a source that can't be used says why and leaves nothing behind."""

import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
import threading
import types
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray.data.dataset import MaterializedDataset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10

from helpers import data, settings
from helpers.preprocessing import image_ids


def settings_of(tmp_path, **choices):
    return settings.Settings(storage=str(tmp_path / "storage"), **choices)


def read(folder, split):
    table = pq.read_table(f"{folder}/{split}", partitioning=None)
    return table["image"].combine_chunks().to_numpy_ndarray(), table["label"].to_numpy()


def leftovers(tmp_path):
    storage = tmp_path / "storage" / "data"
    return sorted(entry.name for entry in storage.iterdir() if entry.is_dir()) if storage.exists() else []


def assert_no_image_is_in_two_splits(folder):
    ids = [set(image_ids(read(folder, split)[0]).tolist()) for split in data.SPLITS]
    assert all(not first & second for first, second in itertools.combinations(ids, 2))


def test_digits_as_parquet(tmp_path):
    folder = data.prepare(settings_of(tmp_path))
    for split, count in (("train", 1260), ("validation", 180), ("test", 357)):
        images, labels = read(folder, split)
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.dtype == np.int64
        shares = np.bincount(labels) / count
        assert np.allclose(shares, 0.1, atol=0.01), "the split is not stratified"
        assert len(list(Path(folder, split).glob("*.parquet"))) == 8
        metadata = pq.read_schema(f"{folder}/{split}/part-00000.parquet").metadata
        assert json.loads(metadata[b"class_names"]) == [str(digit) for digit in range(10)]
    assert_no_image_is_in_two_splits(folder)
    assert data.is_complete(folder) and leftovers(tmp_path) == ["digits"]


def test_the_test_split_of_the_digits_never_changes(tmp_path):
    """Accuracies of different days are compared, so it is always these 357, enlarged in this way."""
    scans = load_digits()
    _, test = train_test_split(np.arange(1797), test_size=357, stratify=scans.target, random_state=0)
    images, labels = read(data.prepare(settings_of(tmp_path)), "test")
    assert np.array_equal(labels, scans.target[test])
    grey = Image.fromarray((scans.images[test[0]] * (255 / 16)).astype(np.uint8))
    assert np.array_equal(images[0, :, :, 0], np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR)))


def test_digits_of_another_size(tmp_path):
    folder = data.prepare(settings_of(tmp_path, image_size=65))
    assert Path(folder).name == "digits-65"
    assert read(folder, "validation")[0].shape == (180, 65, 65, 3)
    small, large = (read(data.prepare(settings_of(tmp_path, image_size=size)), "test")[0] for size in (32, 65))
    assert np.abs(small.mean((1, 2)) - large.mean((1, 2))).max() < 5


def test_a_table_gives_back_every_pixel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (21, 24, 40, 3), dtype=np.uint8)
    data.write_split(data.to_table(images, np.arange(21), ["a"]), str(tmp_path / "train"), num_files=4)
    back, labels = read(tmp_path, "train")
    assert np.array_equal(back, images) and np.array_equal(labels, np.arange(21))
    assert len(list((tmp_path / "train").iterdir())) == 4


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("name", ["plain", "run=1", "what?", "#1", "50%41", "a b", "new\nline", "[x]*", "größe"])
def test_load_reads_what_was_prepared_wherever_it_lies(tmp_path, name):
    cfg = settings_of(tmp_path / name)
    images, labels = read(data.prepare(cfg), "validation")
    dataset = data.load("validation", cfg)
    assert dataset.schema().names == ["image", "label"]
    batch = dataset.take_batch(180)
    assert sorted(image_ids(batch["image"])) == sorted(image_ids(images))
    assert sorted(batch["label"]) == sorted(labels)


@pytest.mark.usefixtures("shared_ray")
def test_load_keeps_the_order_of_the_files(tmp_path):
    """A run that is compared with another must read the same images first, even if its first file takes longest."""
    cfg = settings_of(tmp_path)
    images, labels = read(data.prepare(cfg), "train")
    folder, names = f"{data.prepare(cfg)}/train", [str(digit) for digit in range(10)]
    first = f"{folder}/part-00000.parquet"
    noise = np.random.default_rng(0).integers(0, 256, (20_000, *images.shape[1:]), dtype=np.uint8)
    pq.write_table(data.to_table(noise, labels[:1].repeat(20_000), names), first)
    _, expected = read(data.prepare(cfg), "train")
    assert np.array_equal(data.load("train", cfg).take_batch(len(expected))["label"], expected)


@pytest.mark.usefixtures("shared_ray")
def test_load_keeps_a_small_split_in_memory_and_streams_a_large_one(tmp_path, monkeypatch):
    cfg = settings_of(tmp_path)
    assert isinstance(data.load("train", cfg), MaterializedDataset)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": 1e6})
    streamed = data.load("train", cfg)
    assert not isinstance(streamed, MaterializedDataset)
    # In blocks of which a store holds many.
    assert streamed.materialize().num_blocks() > 32


def test_load_refuses_an_unknown_split():
    with pytest.raises(data.DataError, match="no split 'val': use train, validation or test"):
        data.load("val")


def test_an_interrupted_write_is_never_taken_for_data(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original, calls = data.write_split, []
        patch.setattr(
            data, "write_split", lambda *a, **k: calls.append(a) or (original(*a, **k) if len(calls) == 1 else stop())
        )
        with pytest.raises(KeyboardInterrupt):
            data.prepare(settings_of(tmp_path))
    assert leftovers(tmp_path) == []
    # Killed where nothing can tidy up: the final folder without its mark is made again.
    (tmp_path / "storage/data/digits/train").mkdir(parents=True)
    folder = data.prepare(settings_of(tmp_path))
    assert data.is_complete(folder) and len(read(folder, "test")[0]) == 357


def test_data_without_a_validation_split_are_made_again(tmp_path):
    """As earlier versions left them."""
    folder = data.prepare(settings_of(tmp_path))
    shutil.rmtree(f"{folder}/validation")
    assert not data.is_complete(folder)
    assert len(read(data.prepare(settings_of(tmp_path)), "validation")[0]) == 180


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Let s3://bucket lead to a folder, through a file system that can't rename what it holds, like a real one."""
    remote = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("file")))
    found = types.SimpleNamespace(from_uri=lambda uri: (remote, uri.replace("s3://bucket", str(tmp_path))))
    fs = types.SimpleNamespace(**{**vars(pyarrow.fs), "FileSystem": found})
    monkeypatch.setattr(data, "pyarrow", types.SimpleNamespace(fs=fs))
    return tmp_path


def test_data_in_a_bucket_count_once_they_are_whole(bucket, monkeypatch):
    storage = settings.Settings(storage="s3://bucket/storage")
    with monkeypatch.context() as patch:
        original = data.write_split

        def fill_the_bucket(*arguments, **options):
            original(*arguments, **options)
            raise OSError("the bucket is full")

        patch.setattr(data, "write_split", fill_the_bucket)
        with pytest.raises(OSError, match="full"):
            data.prepare(storage)
    assert leftovers(bucket) == []
    assert data.prepare(storage) == "s3://bucket/storage/data/digits"
    assert data.is_complete("s3://bucket/storage/data/digits") and leftovers(bucket) == ["digits"]
    assert data.class_names(storage) == [str(digit) for digit in range(10)]
    assert len(read(bucket / "storage/data/digits", "train")[0]) == 1260


def test_a_notebook_that_is_interrupted_takes_no_image_from_another_one_in_the_same_bucket(bucket, monkeypatch):
    storage = settings.Settings(storage="s3://bucket/storage")
    original, calls = data.write_split, []

    def while_another_notebook_begins(table, *arguments, **options):
        original(table, *arguments, **options)
        calls.append(len(table))
        if len(calls) == 1:  # the first split is written, and another notebook prepares the same data
            with pytest.raises(KeyboardInterrupt):
                data.prepare(storage)
        elif len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_split", while_another_notebook_begins)
    data.prepare(storage)
    assert len(calls) > 2 and leftovers(bucket) == ["digits"]
    assert [len(read(bucket / "storage/data/digits", split)[0]) for split in data.SPLITS] == [1260, 180, 357]


@pytest.mark.usefixtures("shared_ray")
def test_data_and_storage_may_both_be_uris(tmp_path, image_folder):
    cfg = settings.Settings(data=f"file://{image_folder}", storage=f"file://{tmp_path}/storage")
    folder = data.prepare(cfg)
    assert data.prepare(cfg) == folder and folder.startswith(f"file://{tmp_path}/storage/data/images-")
    assert data.class_names(cfg) == ["dark", "light"]
    assert data.load("test", cfg).count() == 14


def test_prepare_names_images_in_a_bucket_that_can_not_be_listed(tmp_path):
    cfg = settings.Settings(data=f"file://key:secret@{tmp_path}/nowhere", storage=str(tmp_path / "storage"))
    with pytest.raises(data.DataError, match="can't be listed .* check TUTORIAL_DATA") as raised:
        data.prepare(cfg)
    assert "secret" not in str(raised.value)


# --- CIFAR-10 ---


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """Pack an archive like the official one, with 20 images a file, and let torchvision expect its checksums."""
    rng = np.random.default_rng(0)
    files, names = {}, [[f"data_batch_{n}", ""] for n in range(1, 6)] + [["test_batch", ""]]
    for entry in names:
        content = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        files[entry[0]] = pickle.dumps(content)
        entry[1] = hashlib.md5(files[entry[0]]).hexdigest()
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {n}" for n in range(10)]})
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "train_list", names[:5])
    monkeypatch.setattr(CIFAR10, "test_list", names[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(files["batches.meta"]).hexdigest()})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_cifar10_from_an_archive_that_the_learner_has(tmp_path, small_cifar10):
    cfg = settings_of(tmp_path, data="cifar10", cifar10_archive=str(small_cifar10))
    folder = data.prepare(cfg)
    assert data.class_names(cfg)[3] == "class 3"
    for split, each in (("train", 9), ("validation", 1), ("test", 2)):
        images, labels = read(folder, split)
        assert images.shape == (10 * each, 32, 32, 3) and np.bincount(labels).tolist() == [each] * 10
    assert_no_image_is_in_two_splits(folder)


def test_cifar10_of_another_size(tmp_path, small_cifar10):
    folder = data.prepare(settings_of(tmp_path, data="cifar10", cifar10_archive=str(small_cifar10), image_size=64))
    assert Path(folder).name == "cifar10-64" and read(folder, "train")[0].shape == (90, 64, 64, 3)


def test_cifar10_from_the_data_folder_under_its_official_name(tmp_path, small_cifar10):
    place = tmp_path / "storage" / "data"
    place.mkdir(parents=True)
    small_cifar10.rename(place / CIFAR10.filename)
    assert data.is_complete(data.prepare(settings_of(tmp_path, data="cifar10")))


def test_a_truncated_archive_is_refused_by_its_checksum(tmp_path, small_cifar10):
    small_cifar10.write_bytes(small_cifar10.read_bytes()[:-1000])
    with pytest.raises(data.DataError, match="cifar-10-python.tar.gz is not the whole.*delete it or put a whole copy"):
        data.prepare(settings_of(tmp_path, data="cifar10", cifar10_archive=str(small_cifar10)))
    assert leftovers(tmp_path) == []
    assert small_cifar10.exists(), "a learner's own file is never deleted"


def test_cifar10_is_downloaded_once_and_kept(tmp_path, small_cifar10, monkeypatch, capfd):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(small_cifar10.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
        folder = data.prepare(settings_of(tmp_path, data="cifar10"))
        server.shutdown()
    assert len(read(folder, "train")[0]) == 90
    assert "100%" in capfd.readouterr().err, "no progress bar was shown"
    kept = tmp_path / "storage" / "data" / CIFAR10.filename
    assert kept.read_bytes() == small_cifar10.read_bytes()
    shutil.rmtree(folder)
    assert data.is_complete(data.prepare(settings_of(tmp_path, data="cifar10"))), (
        "it was not taken from the data folder"
    )


def test_without_network_the_sentence_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(data.DataError, match="could not be downloaded.*TUTORIAL_CIFAR10_ARCHIVE.*TUTORIAL_DATA=digits"):
        data.prepare(settings_of(tmp_path, data="cifar10"))
    assert leftovers(tmp_path) == []


# --- a folder of one's own images ---

with_ray = pytest.mark.usefixtures("shared_ray")
RNG = np.random.default_rng(0)


def write_noise(folder, count, brightness=128):
    """Write `count` different images."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = RNG.normal(brightness, 20, (36, 36, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{number:03d}.png"))


def prepared(tmp_path, root, **choices):
    """Each split's images and labels of a folder."""
    folder = data.prepare(settings_of(tmp_path, data=str(root), **choices))
    assert data.is_complete(folder) and sorted(os.listdir(folder)) == ["_SUCCESS", *sorted(data.SPLITS)]
    return {split: read(folder, split) for split in data.SPLITS}


def counts(splits):
    return {split: np.bincount(labels).tolist() for split, (_, labels) in splits.items()}


@with_ray
@pytest.mark.parametrize("size", [32, 64])
def test_a_folder_of_any_size_and_mode(tmp_path, image_folder, size):
    splits = prepared(tmp_path, image_folder, image_size=size)
    assert counts(splits) == {"train": [21, 21], "validation": [3, 3], "test": [7, 7]}
    for images, labels in splits.values():
        assert images.shape == (len(labels), size, size, 3) and images.dtype == np.uint8
        assert images[labels == 0].mean() < 100 < images[labels == 1].mean(), "images and labels do not belong together"
    assert data.class_names(settings_of(tmp_path, data=str(image_folder), image_size=size)) == ["dark", "light"]


@with_ray
def test_given_splits_are_left_as_they_are(tmp_path):
    for split, count in (("Train", 9), ("val", 4), ("testing", 5)):
        for name in ("a", "b"):
            write_noise(tmp_path / "images" / split / name, count)
    splits = prepared(tmp_path, tmp_path / "images")
    assert counts(splits) == {"train": [9, 9], "validation": [4, 4], "test": [5, 5]}


@with_ray
def test_missing_splits_are_drawn_in_proportion_and_said(tmp_path, capsys):
    for name, count in (("a", 100), ("b", 40), ("c", 3)):
        write_noise(tmp_path / "images" / name, count)
    splits = prepared(tmp_path, tmp_path / "images")
    assert counts(splits) == {"train": [70, 28, 1], "validation": [10, 4, 1], "test": [20, 8, 1]}
    ids = [image_id for images, _ in splits.values() for image_id in image_ids(images)]
    assert len(set(ids)) == 143, "an image was lost, or is in two splits"
    said = capsys.readouterr().out
    assert "no folder test/: 29 training images" in said and "no folder validation/: 15 training images" in said


@with_ray
def test_other_seeds_draw_the_same_splits(tmp_path):
    for name in "ab":
        write_noise(tmp_path / "images" / name, 20)
    first, second = (prepared(tmp_path, tmp_path / "images", seed=seed) for seed in (1, 2))
    for split in data.SPLITS:
        ids = [image_ids(splits[split][0]).tolist() for splits in (first, second)]
        assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])


@with_ray
def test_equal_images_are_in_one_split(tmp_path):
    for name in "ab":
        write_noise(tmp_path / "images" / name, 10)
        for file in list((tmp_path / "images" / name).iterdir())[:5]:
            Image.open(file).save(file.with_suffix(".bmp"))  # other bytes, the same pixels
            shutil.copy(file, file.with_suffix(".copy.png"))
    splits = prepared(tmp_path, tmp_path / "images")
    assert sum(len(labels) for _, labels in splits.values()) == 40
    ids = [set(image_ids(images).tolist()) for images, _ in splits.values()]
    assert sum(map(len, ids)) == 20


@with_ray
def test_images_that_are_in_test_and_in_train_are_counted(tmp_path, image_folder, capsys):
    for name in ("000.png", "003.png"):
        shutil.copy(image_folder / "train/dark" / name, image_folder / "test/dark" / f"again-{name}")
    prepared(tmp_path, image_folder)
    (image_folder / "val").mkdir()
    for name in ("dark", "light"):
        shutil.copytree(image_folder / "test" / name, image_folder / "val" / name)
    prepared(tmp_path, image_folder)
    said = capsys.readouterr().out
    for line in ("test that are also in train: 2", "validation that are also in train: 2"):
        assert f"Images of {line}." in said
    assert "Images of validation that are also in test: 16." in said


@with_ray
def test_a_class_too_small_for_validation_is_named_and_kept(tmp_path, image_folder, capsys):
    for split in ("train", "test"):
        write_noise(image_folder / split / "rare", 1)
    splits = prepared(tmp_path, image_folder)
    assert counts(splits) == {"train": [21, 21, 1], "validation": [3, 3], "test": [7, 7, 1]}
    assert "None of rare: too few different images." in capsys.readouterr().out


@with_ray
@pytest.mark.parametrize("copies", [1, 5])
def test_a_class_too_small_for_test_is_refused(tmp_path, copies):
    for name, count in (("common", 12), ("rare", 1)):
        write_noise(tmp_path / "images" / name, count)
    for copy in range(1, copies):
        shutil.copy(tmp_path / "images/rare/000.png", tmp_path / f"images/rare/{copy}.png")
    with pytest.raises(data.DataError, match="rare: too few different images to draw some for test"):
        prepared(tmp_path, tmp_path / "images")
    assert leftovers(tmp_path) == []


@with_ray
def test_forty_images(tmp_path):
    for name in "ab":
        write_noise(tmp_path / "images" / name, 20)
    assert counts(prepared(tmp_path, tmp_path / "images")) == {
        "train": [14] * 2,
        "validation": [2] * 2,
        "test": [4] * 2,
    }


@with_ray
def test_a_thousand_classes(tmp_path):
    for number in range(1000):
        folder = tmp_path / "images" / f"class {number:04d}"
        folder.mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), (number % 250, number // 250 * 60, 40 * index)).save(folder / f"{index}.png")
    splits = prepared(tmp_path, tmp_path / "images")
    for images, labels in splits.values():
        assert sorted(labels) == list(range(1000))
        assert np.array_equal(images[:, 0, 0, 0] + images[:, 0, 0, 1] // 60 * 250.0, labels)


@with_ray
def test_what_changes_the_data_changes_the_folder(tmp_path, image_folder):
    def folder(**choices):
        return data.prepare(settings_of(tmp_path, data=str(image_folder), **choices))

    first = folder()
    assert folder() == first
    others = [folder(image_size=40), folder(seed=1), folder(on_bad_image="skip")]
    (image_folder / "train/dark/.DS_Store").write_bytes(b"\0")
    (image_folder / "train/notes.txt").write_text("nothing")
    assert folder() == first
    (image_folder / "train/dark/000.png").unlink()
    others.append(folder())
    assert len({first, *others}) == 5


@with_ray
def test_what_plays_no_part_is_said_once(tmp_path, image_folder, capsys):
    (image_folder / "train/notes.txt").write_text("nothing")
    prepared(tmp_path, image_folder)
    assert capsys.readouterr().out.count(f"Passed over in {image_folder}: 1 × .txt file.\n") == 1
    prepared(tmp_path, image_folder)
    assert capsys.readouterr().out == ""


@with_ray
def test_a_damaged_image_stops_and_is_named_with_the_reason(tmp_path, image_folder):
    (image_folder / "train/dark/004.jpg").write_bytes(b"")
    (image_folder / "train/light/004.jpg").write_bytes(b"no image")
    with pytest.raises(data.DataError) as error:
        prepared(tmp_path, image_folder)
    assert str(error.value) == (
        f"The image {image_folder}/train/dark/004.jpg is empty: copy it again or delete it. "
        "2 of 62 images can't be read. Set TUTORIAL_ON_BAD_IMAGE=skip to leave them out."
    )
    assert leftovers(tmp_path) == []


@with_ray
def test_a_damaged_image_is_left_out_if_the_learner_says_so(tmp_path, image_folder, capsys):
    (image_folder / "train/dark/004.jpg").write_bytes(b"no image")
    splits = prepared(tmp_path, image_folder, on_bad_image="skip")
    assert counts(splits) == {"train": [20, 21], "validation": [3, 3], "test": [7, 7]}
    for images, labels in splits.values():
        assert images[labels == 0].mean() < 100 < images[labels == 1].mean(), "labels shifted against the images"
    assert "004.jpg is text, not an image: delete it. 1 of 62 images can't be read." in capsys.readouterr().out


@with_ray
def test_splits_are_drawn_from_what_can_be_decoded(tmp_path):
    for name in "ab":
        write_noise(tmp_path / "images" / name, 10)
    for number in range(7):
        (tmp_path / f"images/a/{number:03d}.png").write_bytes(b"")
    splits = prepared(tmp_path, tmp_path / "images", on_bad_image="skip")
    assert counts(splits) == {"train": [1, 7], "validation": [1, 1], "test": [1, 2]}


@with_ray
@pytest.mark.parametrize("split", ["train", "test"])
def test_leaving_out_may_not_empty_a_class(tmp_path, image_folder, split):
    for file in (image_folder / split / "dark").iterdir():
        file.write_bytes(b"")
    says = f"No image of the class dark in {split} can be read. The image .*/{split}/dark/000.png is empty"
    with pytest.raises(data.DataError, match=says):
        prepared(tmp_path, image_folder, on_bad_image="skip")
    assert leftovers(tmp_path) == []


def test_a_folder_that_can_not_be_used_leaves_nothing_behind(tmp_path, image_folder):
    os.rename(image_folder / "train", image_folder / "learn")
    with pytest.raises(data.DataError, match="has no folder train/"):
        prepared(tmp_path, image_folder)
    assert leftovers(tmp_path) == []
