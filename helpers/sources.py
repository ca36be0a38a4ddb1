"""Where the pictures come from: the digits inside scikit-learn, CIFAR-10, or a folder of one's own."""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.settings import DEFAULT_STORAGE, Settings

IMAGE_SIZE = 32  # pixels, both ways: the size of a CIFAR-10 picture
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
TEST_NAMES = ("test", "val", "valid", "validation")


class DataError(ValueError):
    """A data source can't be used; the message says what is wrong and what to do."""


def digits() -> dict:
    """Return the 1,797 scanned digits that ship inside scikit-learn, enlarged from 8×8 to 32×32 RGB.

    Returns:
        `train` (1,440 pictures) and `test` (357), each a pair of uint8 (count, 32, 32, 3) and int64 (count,), split
        the same way each time with every class in proportion; and `class_names`.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    size = (IMAGE_SIZE, IMAGE_SIZE)
    grey = (scans.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR)) for scan in grey])
    images = np.repeat(large[..., None], 3, axis=-1)
    train, test = stratified_split(scans.target, test_size=357)
    return {
        "train": (images[train], scans.target[train]),
        "test": (images[test], scans.target[test]),
        "class_names": [str(digit) for digit in range(10)],
    }


def cifar10(chosen: Settings) -> dict:
    """Return CIFAR-10 as `digits` does: 50,000 pictures to train on and 10,000 to test with, in a fixed random order.

    The archive is `chosen.cifar10_archive`, or the one in the data folder under its official name, or downloaded
    there with a progress bar. It is unpacked into a temporary folder.

    Raises:
        DataError: the archive's checksum is wrong, or the download failed.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    archive = cifar10_archive(chosen)
    pictures = {}
    with tempfile.TemporaryDirectory() as unpacked:
        extract_archive(archive, unpacked)
        for split in ("train", "test"):
            part = CIFAR10(unpacked, train=split == "train")
            order = np.random.default_rng(0).permutation(len(part.data))
            pictures[split] = (part.data[order], np.asarray(part.targets)[order])
        pictures["class_names"] = part.classes
    return pictures


def cifar10_archive(chosen: Settings) -> str:
    """Return the path of a CIFAR-10 archive with the right checksum, downloading it if there is none."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    root = chosen.storage if "://" not in chosen.storage else str(DEFAULT_STORAGE)
    archive = Path(chosen.cifar10_archive or Path(root, "data", CIFAR10.filename))
    if not archive.exists():
        print(f"Downloading CIFAR-10 (162 MB) to {archive}; an archive that you have can go there instead.")
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as beside:
            try:
                download_url(CIFAR10.url, beside, CIFAR10.filename, CIFAR10.tgz_md5)
            except Exception as error:
                raise DataError(
                    f"CIFAR-10 could not be downloaded ({error}). Put {CIFAR10.filename} from another machine into "
                    f"{archive.parent}, or name it in TUTORIAL_CIFAR10_ARCHIVE, or go on with TUTORIAL_DATA=digits."
                ) from error
            Path(beside, CIFAR10.filename).replace(archive)
    checksum = _md5(archive)
    if checksum != CIFAR10.tgz_md5:
        raise DataError(
            f"{archive} is not the whole CIFAR-10 archive: it has {archive.stat().st_size:,} bytes and the MD5 "
            f"checksum {checksum} instead of {CIFAR10.tgz_md5}. Delete it or put a whole copy in its place."
        )
    return str(archive)


def list_folder(folder: str, seed: int) -> dict:
    """List the pictures of a folder `<split>/<class>/*.{jpg,jpeg,png}`.

    Args:
        folder: holds `train/` and one of `test/`, `val/`, `valid/`, `validation/`. Where the second is missing, a fifth
            of each class is set aside for it.
        seed: of the order in which the pictures are listed.

    Returns:
        `train` and `test`, each a pair of shuffled paths and int64 labels (count,), and `class_names`, sorted.

    Raises:
        DataError: no `train/`, fewer than two classes, a class without pictures, or a class that training lacks.
    """
    train_folder = Path(folder, "train")
    if not train_folder.is_dir():
        raise DataError(f"{folder} has no folder train/: put the pictures in train/<class>/.")
    classes = sorted(entry.name for entry in os.scandir(train_folder) if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"{train_folder} needs at least two class folders with pictures and has {len(classes)}.")
    train = _list_split(train_folder, classes)
    held_out = next((Path(folder, name) for name in TEST_NAMES if Path(folder, name).is_dir()), None)
    if held_out:
        test = _list_split(held_out, classes)
    else:
        paths, labels = train
        smallest = int(np.bincount(labels).argmin())
        if np.bincount(labels).min() < 2:
            raise DataError(f"The class {classes[smallest]} needs 2 pictures or more, so that one can be held out.")
        print(f"{folder} has no folder test/: a fifth of each class is held out for it.")
        keep, out = stratified_split(labels, test_size=max(len(classes), len(paths) // 5))
        train, test = (
            ([paths[i] for i in keep], labels[keep]),
            ([paths[i] for i in out], labels[out]),
        )
    listing = {"class_names": classes}
    for split, (paths, labels) in (("train", train), ("test", test)):
        order = np.random.default_rng(seed).permutation(len(paths))
        listing[split] = ([paths[index] for index in order], labels[order])
    return listing


def stratified_split(labels: np.ndarray, test_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices for training and for testing, the same each time, with every class in proportion."""
    from sklearn.model_selection import train_test_split

    return train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=0)


def decode(paths: list[str]) -> tuple[np.ndarray, list[int], list[str]]:
    """Decode pictures of any size and mode to 32×32 RGB, keeping their proportions by cropping the middle.

    Returns:
        The pictures, uint8 (count, 32, 32, 3); the indices of those that could be decoded; the paths of the others.
    """
    images, kept, failed = [], [], []
    for index, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                images.append(_fit(picture))
            kept.append(index)
        except Exception:  # Pillow raises many kinds for a damaged file; whichever it is, the file is named
            failed.append(str(path))
    return (
        np.stack(images) if images else np.empty((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        kept,
        failed,
    )


def fingerprint(folder: str) -> list[str]:
    """Name, size and time of change of every picture under `folder`, sorted: changes when the pictures do."""
    entries = []
    for parent, _, names in os.walk(folder):
        place = os.path.relpath(parent, folder)
        for name in names:
            if name.lower().endswith(PICTURE_SUFFIXES):
                status = os.stat(os.path.join(parent, name))
                entries.append(f"{place}/{name} {status.st_size} {status.st_mtime_ns}")
    return sorted(entries)


def _fit(picture: Image.Image) -> np.ndarray:
    from PIL import ImageOps

    size = (IMAGE_SIZE, IMAGE_SIZE)
    picture.draft("RGB", size)  # lets a JPEG be decoded at a fraction of its size
    ImageOps.exif_transpose(picture, in_place=True)
    upright = picture if picture.mode == "RGB" else picture.convert("RGB")
    return np.asarray(upright if upright.size == size else ImageOps.fit(upright, size, Image.Resampling.BILINEAR))


def _list_split(folder: Path, classes: list[str]) -> tuple[list[str], np.ndarray]:
    strangers = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name not in classes)
    if strangers:
        raise DataError(f"{folder} has the class {strangers[0]}, which train/ does not have.")
    paths, labels = [], []
    for label, name in enumerate(classes):
        class_folder = folder / name
        if not class_folder.is_dir():
            continue
        found = sorted(e.path for e in os.scandir(class_folder) if e.name.lower().endswith(PICTURE_SUFFIXES))
        if not found:
            raise DataError(
                f"The class folder {class_folder} holds no picture (jpg, jpeg or png): add some or delete it."
            )
        paths += found
        labels += [label] * len(found)
    return paths, np.asarray(labels, dtype=np.int64)


def _md5(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
