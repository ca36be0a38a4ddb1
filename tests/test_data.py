"""Every source becomes the same Parquet layout, and a source that can't be used says why and leaves nothing behind."""

import functools
import hashlib
import http.server
import io
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
from PIL import Image
from torchvision.datasets import CIFAR10

from helpers import data, settings, sources


def chosen(tmp_path, **choices):
    return settings.Settings(storage=str(tmp_path / "storage"), **choices)


def read(folder, split):
    table = pq.read_table(f"{folder}/{split}")
    return table["image"].combine_chunks().to_numpy_ndarray(), table["label"].to_numpy()


def leftovers(tmp_path):
    storage = tmp_path / "storage" / "data"
    return sorted(entry.name for entry in storage.iterdir() if entry.is_dir()) if storage.exists() else []


def test_digits_as_parquet(tmp_path):
    folder = data.prepare(chosen(tmp_path))
    for split, count in (("train", 1440), ("test", 357)):
        images, labels = read(folder, split)
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
        assert labels.dtype == np.int64
        shares = np.bincount(labels) / count
        assert np.allclose(shares, 0.1, atol=0.01), "the split is not stratified"
        assert len(list(Path(folder, split).glob("*.parquet"))) == 8
        assert data.read_class_names(f"{folder}/{split}") == [str(digit) for digit in range(10)]
    assert data.is_whole(folder) and leftovers(tmp_path) == ["digits"]


def test_no_digit_is_in_both_splits_and_none_is_lost():
    digits = sources.digits()
    pictures = {split: {image.tobytes() for image in digits[split][0]} for split in ("train", "test")}
    assert not pictures["train"] & pictures["test"]
    assert len(pictures["train"]) + len(pictures["test"]) > 1700  # a few scans are equal
    assert len(digits["train"][0]) + len(digits["test"][0]) == 1797


def test_a_table_gives_back_every_pixel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), dtype=np.uint8)
    data.write_split(data.to_table(images, np.arange(21), ["a"]), str(tmp_path / "train"), num_files=4)
    back, labels = read(tmp_path, "train")
    assert np.array_equal(back, images) and np.array_equal(labels, np.arange(21))
    assert len(list((tmp_path / "train").iterdir())) == 4


def test_ray_reads_what_was_prepared(tmp_path):
    dataset = data.load("test", chosen(tmp_path))
    batch = dataset.take_batch(357)
    images, labels = read(data.prepare(chosen(tmp_path)), "test")
    assert {image.tobytes() for image in batch["image"]} == {image.tobytes() for image in images}
    assert sorted(batch["label"]) == sorted(labels)


def test_an_interrupted_write_is_never_taken_for_data(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original, calls = data.write_split, []
        patch.setattr(data, "write_split", lambda *a: calls.append(a) or (original(*a) if len(calls) == 1 else stop()))
        with pytest.raises(KeyboardInterrupt):
            data.prepare(chosen(tmp_path))
    assert leftovers(tmp_path) == []
    # Killed where nothing can tidy up: the final folder without its mark is made anew.
    (tmp_path / "storage/data/digits/train").mkdir(parents=True)
    folder = data.prepare(chosen(tmp_path))
    assert data.is_whole(folder) and len(read(folder, "test")[0]) == 357


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

        def fill_the_bucket(*arguments):
            original(*arguments)
            raise OSError("the bucket is full")

        patch.setattr(data, "write_split", fill_the_bucket)
        with pytest.raises(OSError, match="full"):
            data.prepare(storage)
    assert leftovers(bucket) == []
    assert data.prepare(storage) == "s3://bucket/storage/data/digits"
    assert data.is_whole("s3://bucket/storage/data/digits") and leftovers(bucket) == ["digits"]
    assert data.class_names(storage) == [str(digit) for digit in range(10)]
    assert len(read(bucket / "storage/data/digits", "train")[0]) == 1440


# --- CIFAR-10 ---


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """Pack an archive like the official one, with 20 pictures a file, and let torchvision expect its checksums."""
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


def test_cifar10_from_an_archive_that_the_reader_has(tmp_path, small_cifar10):
    folder = data.prepare(chosen(tmp_path, data="cifar10", cifar10_archive=str(small_cifar10)))
    images, labels = read(folder, "train")
    assert images.shape == (100, 32, 32, 3) and sorted(labels) == sorted(list(range(10)) * 10)
    assert data.read_class_names(f"{folder}/train")[3] == "class 3"
    assert len(read(folder, "test")[0]) == 20


def test_cifar10_from_the_data_folder_under_its_official_name(tmp_path, small_cifar10):
    place = tmp_path / "storage" / "data"
    place.mkdir(parents=True)
    small_cifar10.rename(place / CIFAR10.filename)
    assert data.is_whole(data.prepare(chosen(tmp_path, data="cifar10")))


def test_a_truncated_archive_is_refused_by_its_checksum(tmp_path, small_cifar10):
    small_cifar10.write_bytes(small_cifar10.read_bytes()[:-1000])
    with pytest.raises(data.DataError, match="cifar-10-python.tar.gz is not the whole.*Delete it or put a whole copy"):
        data.prepare(chosen(tmp_path, data="cifar10", cifar10_archive=str(small_cifar10)))
    assert leftovers(tmp_path) == []
    assert small_cifar10.exists(), "a reader's own file is never deleted"


def test_cifar10_is_downloaded_once_and_kept(tmp_path, small_cifar10, monkeypatch, capfd):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(small_cifar10.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
        folder = data.prepare(chosen(tmp_path, data="cifar10"))
        server.shutdown()
    assert len(read(folder, "train")[0]) == 100
    assert "100%" in capfd.readouterr().err, "no progress bar was shown"
    kept = tmp_path / "storage" / "data" / CIFAR10.filename
    assert kept.read_bytes() == small_cifar10.read_bytes()
    shutil.rmtree(folder)
    assert data.is_whole(data.prepare(chosen(tmp_path, data="cifar10"))), "it was not taken from the data folder"


def test_without_network_the_sentence_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(data.DataError, match="could not be downloaded.*TUTORIAL_CIFAR10_ARCHIVE.*TUTORIAL_DATA=digits"):
        data.prepare(chosen(tmp_path, data="cifar10"))
    assert leftovers(tmp_path) == []


# --- a folder of one's own pictures ---


def test_a_folder_of_any_size_and_mode(tmp_path, folder_of_pictures):
    folder = data.prepare(chosen(tmp_path, data=str(folder_of_pictures)))
    images, labels = read(folder, "train")
    assert images.shape == (48, 32, 32, 3) and images.dtype == np.uint8
    assert list(np.bincount(labels)) == [24, 24]
    assert data.read_class_names(f"{folder}/train") == ["dark", "light"]
    assert images[labels == 0].mean() < 100 < images[labels == 1].mean(), "pictures and labels do not belong together"
    assert np.bincount(read(folder, "test")[1]).tolist() == [7, 7]


def test_changed_pictures_are_read_anew(tmp_path, folder_of_pictures):
    first = data.prepare(chosen(tmp_path, data=str(folder_of_pictures)))
    assert data.prepare(chosen(tmp_path, data=str(folder_of_pictures))) == first
    (folder_of_pictures / "train/dark/000.png").unlink()
    second = data.prepare(chosen(tmp_path, data=str(folder_of_pictures)))
    assert second != first and len(read(second, "train")[0]) == 47


def test_a_missing_test_split_is_held_out_in_proportion(tmp_path, folder_of_pictures, capsys):
    os.rename(folder_of_pictures / "test", tmp_path / "elsewhere")
    folder = data.prepare(chosen(tmp_path, data=str(folder_of_pictures)))
    train, test = read(folder, "train")[1], read(folder, "test")[1]
    assert len(train) + len(test) == 48
    assert abs(np.bincount(test)[0] - np.bincount(test)[1]) <= 1 and 8 <= len(test) <= 10
    assert "a fifth of each class is held out" in capsys.readouterr().out


def test_an_unreadable_picture_stops_and_is_named(tmp_path, folder_of_pictures):
    (folder_of_pictures / "train/dark/004.jpg").write_bytes(b"not a picture")
    with pytest.raises(data.DataError, match="train/dark/004.jpg can't be decoded.*TUTORIAL_UNREADABLE=skip"):
        data.prepare(chosen(tmp_path, data=str(folder_of_pictures)))
    assert leftovers(tmp_path) == []


def test_an_unreadable_picture_is_left_out_if_the_reader_says_so(tmp_path, folder_of_pictures, capsys):
    (folder_of_pictures / "train/dark/004.jpg").write_bytes(b"not a picture")
    folder = data.prepare(chosen(tmp_path, data=str(folder_of_pictures), unreadable="skip"))
    images, labels = read(folder, "train")
    assert list(np.bincount(labels)) == [23, 24]
    assert images[labels == 0].mean() < 100 < images[labels == 1].mean(), "labels shifted against the pictures"
    assert "Left out 1 of 48 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: os.rename(root / "train", root / "training"), "has no folder train/"),
        (lambda root: [f.unlink() for f in (root / "train/dark").iterdir()], "train/dark holds no picture"),
        (lambda root: os.rename(root / "train/dark", root / "dark"), "at least two class folders"),
        (lambda root: os.rename(root / "test/dark", root / "test/grey"), "class grey, which train/ does not have"),
    ],
)
def test_a_folder_that_can_not_be_used(tmp_path, folder_of_pictures, damage, says):
    damage(folder_of_pictures)
    with pytest.raises(data.DataError, match=says):
        data.prepare(chosen(tmp_path, data=str(folder_of_pictures)))
    assert leftovers(tmp_path) == []


def test_decode_crops_the_middle_and_keeps_proportions(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    images, kept, failed = sources.decode([str(tmp_path / "wide.png"), str(tmp_path / "missing.png")])
    assert kept == [0] and failed == [str(tmp_path / "missing.png")]
    assert images.shape == (1, 32, 32, 3) and images.mean() > 240


def test_an_unknown_split_is_refused():
    with pytest.raises(data.DataError, match="no split 'val': use train or test"):
        data.load("val")
