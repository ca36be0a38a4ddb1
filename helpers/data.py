"""The Parquet layout that every source becomes, and the way back to a Ray Dataset.

`train/`, `validation/` and `test/` hold several Parquet files each: a uint8 fixed-shape tensor column `image`, an int64
column `label`, and the class names in the schema's metadata. A folder is complete once it has the file `_SUCCESS`.
"""

import hashlib
import json
import math
import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.data

from helpers import _sources, cluster, settings
from helpers._sources import SPLITS, DataError
from helpers.preprocessing import image_ids

FILE_BYTES = 2**26  # the most that a file holds of pixels, 64 MB


def to_table(images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> pa.Table:
    """Put images, uint8 (count, height, width, 3), and int64 labels into Arrow, the class names into its metadata."""
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    table = pa.table({"image": pixels, "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"class_names": json.dumps(class_names)})


def write_split(table: pa.Table, folder: str, num_files: int = 8) -> None:
    """Write `table` as `num_files` Parquet files of nearly equal size into `folder`, a path or URI."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    filesystem.create_dir(path)
    rows = math.ceil(table.num_rows / num_files)
    for part, start in enumerate(range(0, table.num_rows, rows)):
        pq.write_table(table.slice(start, rows), f"{path}/part-{part:05d}.parquet", filesystem=filesystem)


def prepare(cfg: settings.Settings | None = None) -> str:
    """Return the folder of the chosen source as Parquet, making it first if need be; or raise Data- or SettingError."""
    cfg = cfg or settings.load()
    settings.require_writable(cfg)
    try:
        listing, notes = ([], []) if cfg.data in ("digits", "cifar10") else _sources.list_folder(cfg.data)
    except (OSError, pa.ArrowInvalid) as error:  # only of a URI
        what = f"The images in {cfg.data} can't be listed ({str(error).splitlines()[0]})"
        raise DataError(f"{what}: check TUTORIAL_DATA, and the variables that hold credentials.") from error
    name = cfg.data if cfg.image_size == settings.Settings.image_size else f"{cfg.data}-{cfg.image_size}"
    if listing:  # the name changes when the images do
        content = repr((settings.hide_secret(cfg.data), cfg.image_size, cfg.seed, cfg.on_bad_image, listing))
        name = f"{cfg.data_name[:60]}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    final, partial = cfg.path("data", name), cfg.path("data", f"{name}.partial-{uuid.uuid4().hex[:8]}")
    if is_complete(final):
        return final
    print(f"Preparing {cfg.data_name} as Parquet in {settings.hide_secret(final)} …", *notes, sep="\n")
    try:
        _write(cfg, listing, partial)
        if not is_complete(final):  # else another notebook was quicker
            _move(partial, final)
    finally:
        _delete(partial)
    return final


def is_complete(folder: str) -> bool:
    """Whether `folder`, a path or URI, holds a data set with all splits that was written to its end."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    files = filesystem.get_file_info([f"{path}/{name}" for name in ("_SUCCESS", *SPLITS)])
    return all(file.type != pyarrow.fs.FileType.NotFound for file in files)


def load(split: str, cfg: settings.Settings | None = None) -> "ray.data.Dataset":
    """Return `train`, `validation` or `test` of the chosen source as a Ray Dataset with columns `image` and `label`."""
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}: use {', '.join(SPLITS[:-1])} or {SPLITS[-1]}.")
    filesystem, path = pyarrow.fs.FileSystem.from_uri(prepare(cfg))
    # Ray would misread a `?` or a line break in the storage folder's name, and make a column of a folder `key=value`.
    root = pyarrow.fs.SubTreeFileSystem(path, filesystem)
    dataset = ray.data.read_parquet(split, filesystem=root, override_num_blocks=16)
    size, store = dataset.size_bytes(), ray.cluster_resources().get("object_store_memory", 0)
    if size <= store / 4:  # so much is read once and kept, and in the order of its files, or two runs might differ
        options = dataset.context.execution_options
        options.preserve_order = True
        dataset = dataset.materialize()
        options.preserve_order = dataset.context.execution_options.preserve_order = False
        return dataset
    # A larger split streams from its files in each epoch, `train` in another order. Every task and every worker holds
    # a few blocks: larger ones would fill a small object store, and Ray would spill them to disk.
    blocks = math.ceil(size / min(FILE_BYTES, max(1, store / 32)))
    shuffle = "files" if split == "train" else None
    return ray.data.read_parquet(split, filesystem=root, shuffle=shuffle, override_num_blocks=blocks)


def class_names(cfg: settings.Settings | None = None) -> list[str]:
    """The chosen source's class names, in the order of the labels."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(prepare(cfg))
    schema = pq.ParquetDataset(f"{path}/train", filesystem=filesystem, partitioning=None).schema
    return json.loads(schema.metadata[b"class_names"])


def _write(cfg: settings.Settings, listing: list[tuple], folder: str) -> None:
    if listing:
        _write_folder(cfg, listing, folder)
    else:
        source = _sources.digits() if cfg.data == "digits" else _sources.cifar10(cfg)
        for split in SPLITS:
            images, labels = source[split]
            table = to_table(_sources.resize(images, cfg.image_size), labels, source["class_names"])
            write_split(table, settings.join(folder, split), num_files=max(8, table.nbytes // FILE_BYTES))
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    filesystem.open_output_stream(f"{path}/_SUCCESS").close()


def _write_folder(cfg: settings.Settings, listing: list[tuple], folder: str) -> None:
    """Decode images in random order into Arrow files, which is quick; then draw missing splits and write Parquet."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    for name in ("decoded", *SPLITS):
        filesystem.create_dir(f"{path}/{name}")
    class_names = sorted({name for _, name, *_ in listing})
    listing = random.Random(cfg.seed).sample(listing, len(listing))
    count = max(8, math.ceil(len(listing) / min(5000, FILE_BYTES // (3 * cfg.image_size**2))))
    parts = [listing[part::count] for part in range(min(count, len(listing)))]

    def decode(part: int, images: list[tuple]) -> tuple:
        pixels, kept, refused = _sources.decode([image[2] for image in images], cfg.image_size, cfg.data)
        images = [images[index] for index in kept]
        if kept:
            table = to_table(pixels, [class_names.index(name) for _, name, *_ in images], class_names)
            with filesystem.open_output_stream(f"{path}/decoded/{part}") as stream:
                feather.write_feather(table, stream, compression="uncompressed")
        return images, image_ids(pixels), refused

    def divide(part: int, splits: np.ndarray) -> None:
        with filesystem.open_input_file(f"{path}/decoded/{part}") as stream:
            table = feather.read_table(stream)
        for split in np.unique(splits):
            file = f"{path}/{split}/part-{part:05d}.parquet"
            pq.write_table(table.filter(splits == split), file, filesystem=filesystem)

    kept, ids, refused = zip(*_in_parallel(decode, enumerate(parts)), strict=True)
    images, refused = [image for part in kept for image in part], {k: v for part in refused for k, v in part.items()}
    if refused:
        left = {image[:2] for image in images}
        if emptied := min((image[:3] for image in listing if image[:2] not in left), default=()):
            split, name, file = emptied
            raise DataError(f"No image of the class {name} in {split} can be read. {refused[file]}")
        first = f"{refused[min(refused)]} {len(refused):,} of {len(listing):,} images can't be read."
        if cfg.on_bad_image == "stop":
            raise DataError(f"{first} Set TUTORIAL_ON_BAD_IMAGE=skip to leave them out.")
        print(f"{first} They are left out.")
    splits = _draw_missing(images, np.concatenate(ids))
    ends = np.cumsum([len(part) for part in kept])
    _in_parallel(divide, [job for job in enumerate(np.split(splits, ends[:-1])) if len(job[1])])
    filesystem.delete_dir(f"{path}/decoded")


def _draw_missing(images: list[tuple], ids: np.ndarray) -> np.ndarray:
    """Return the name of each image's split: of its folder, or of a split that is missing and is drawn from `train`."""
    splits = np.array([split for split, *_ in images], dtype=object)
    class_names, labels = np.unique([name for _, name, *_ in images], return_inverse=True)
    for split, share in (("test", 1 / 5), ("validation", 1 / 8)):
        train = np.flatnonzero(splits == "train")
        if split in splits:
            for other in ("train", "test") if split == "validation" else ("train",):
                if equal := np.isin(ids[splits == split], ids[splits == other]).sum():
                    print(f"Images of {split} that are also in {other}: {equal:,}.")
            continue
        chosen = train[_sources.draw(labels[train], ids[train], share)]
        lacking = ", ".join(class_names[np.setdiff1d(labels[train], labels[chosen])][:3])
        if lacking and (split == "test" or not len(chosen)):
            what = f"{lacking}: too few different images to draw some for {split}"
            raise DataError(f"{what}. Add more, or a folder {split}/.")
        splits[chosen] = split
        none = f" None of {lacking}: too few different images." if lacking else ""
        print(f"There is no folder {split}/: {len(chosen):,} training images are held out for it.{none}")
    return splits


def _in_parallel(function: Callable, jobs: Iterable[tuple]) -> list:
    """Call `function` with the arguments in each job in Ray tasks, one for each core at a time; return the results."""
    at_a_time = cluster.cores() if cluster.on_one_machine() else int(ray.cluster_resources()["CPU"])
    task = ray.remote(function)
    with ThreadPoolExecutor(at_a_time) as threads:  # each waits for one task at a time
        return list(threads.map(lambda job: ray.get(task.remote(*job)), jobs))


def _move(source: str, target: str) -> None:
    """Rename a folder, or copy the files of a bucket that begin with its name, and `_SUCCESS` last."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(source)
    target = pyarrow.fs.FileSystem.from_uri(target)[1]
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        shutil.rmtree(target, ignore_errors=True)  # remains of something that was never whole
        os.rename(path, target)
        return
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    for split in SPLITS:
        filesystem.create_dir(f"{target}/{split}")
    for file in sorted((file for file in found if file.is_file), key=lambda file: file.base_name == "_SUCCESS"):
        filesystem.copy_file(file.path, target + file.path.removeprefix(path))


def _delete(folder: str) -> None:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)
