"""The Parquet layout that every source becomes, and the way back to a Ray Dataset.

A prepared data set is a folder with `train/` and `test/`, several Parquet files each: a uint8 fixed-shape tensor
column `image`, an int64 column `label`, and the class names in the schema's metadata. The empty file `_SUCCESS` is
written last: a folder without it is never taken for data.
"""

import hashlib
import json
import math
import os
import shutil
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.data

from helpers import cluster, settings, sources
from helpers.sources import DataError

SPLITS = ("train", "test")


def to_table(images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> pa.Table:
    """Put pictures into Arrow without copying a pixel through Python.

    Args:
        images: uint8 (count, height, width, 3).
        labels: integers (count,), indices into `class_names`.
        class_names: the name of each class.

    Returns:
        A table with the tensor column `image`, the int64 column `label`, and `class_names` in its metadata.
    """
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    table = pa.table({"image": pixels, "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"class_names": json.dumps(class_names)})


def write_split(table: pa.Table, folder: str, num_files: int = 8) -> None:
    """Write `table` as `num_files` Parquet files of nearly equal size into `folder`, a path or URI."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    filesystem.create_dir(path)
    rows = math.ceil(table.num_rows / num_files)
    for part, start in enumerate(range(0, table.num_rows, rows)):
        file = f"{path}/part-{part:05d}.parquet"
        pq.write_table(table.slice(start, rows), file, filesystem=filesystem)


def read_class_names(folder: str) -> list[str]:
    """Return the class names that stand in the metadata of the Parquet files in `folder`, a path or URI."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    files = filesystem.get_file_info(pyarrow.fs.FileSelector(path))
    first = min(file.path for file in files if file.path.endswith(".parquet"))
    return json.loads(pq.read_schema(first, filesystem=filesystem).metadata[b"class_names"])


def prepare(chosen: settings.Settings | None = None) -> str:
    """Return the folder of the chosen source as Parquet, making it first when it is not there yet.

    Args:
        chosen: the settings; read now when not given.

    Raises:
        DataError: the source can't be used; the sentence says why and what to do. No partial data stay behind.
        SettingError: the storage folder can't be written.
    """
    chosen = chosen or settings.load()
    settings.require_writable(chosen)
    final = chosen.path("data", _folder_name(chosen))
    filesystem, path = _filesystem(final)
    if is_whole(final):
        return final
    print(f"Preparing {chosen.data_name} as Parquet in {final} …")
    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    beside = f"{final}.partial-{uuid.uuid4().hex[:8]}" if local else final
    try:
        _write(chosen, beside)
        if local and is_whole(final):  # another notebook was quicker
            _delete(beside)
        elif local:
            shutil.rmtree(path, ignore_errors=True)  # remains of something that was never whole
            os.rename(_filesystem(beside)[1], path)
    except BaseException:
        _delete(beside)
        raise
    return final


def is_whole(folder: str) -> bool:
    """Whether `folder`, a path or URI, holds a data set that was written to its end."""
    filesystem, path = _filesystem(folder)
    return filesystem.get_file_info(f"{path}/_SUCCESS").type == pyarrow.fs.FileType.File


def load(split: str, chosen: settings.Settings | None = None) -> "ray.data.Dataset":
    """Return `train` or `test` of the chosen source as a Ray Dataset with columns `image` and `label`.

    A split that fills at most a quarter of Ray's object store is read once and kept there, so that no epoch reads
    it again; a larger one streams from its files each time.
    """
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}: use train or test.")
    folder = f"{prepare(chosen)}/{split}"
    dataset = ray.data.read_parquet(folder, override_num_blocks=16)
    return dataset.materialize() if fits_in_memory(dataset) else dataset


def fits_in_memory(dataset: "ray.data.Dataset") -> bool:
    """Whether `dataset` fills at most a quarter of the object store of the Ray that is running."""
    store = ray.cluster_resources().get("object_store_memory", 0)
    return (dataset.size_bytes() or math.inf) <= store / 4


def class_names(chosen: settings.Settings | None = None) -> list[str]:
    """The chosen source's class names, in the order of the labels."""
    return read_class_names(f"{prepare(chosen)}/train")


def _write(chosen: settings.Settings, folder: str) -> None:
    if chosen.data in ("digits", "cifar10"):
        pictures = sources.digits() if chosen.data == "digits" else sources.cifar10(chosen)
        for split in SPLITS:
            images, labels = pictures[split]
            write_split(to_table(images, labels, pictures["class_names"]), f"{folder}/{split}")
    else:
        _write_folder(sources.list_folder(chosen.data, chosen.seed), folder, chosen.unreadable)
    filesystem, path = _filesystem(folder)
    with filesystem.open_output_stream(f"{path}/_SUCCESS"):
        pass


def _write_folder(listing: dict, folder: str, unreadable: str) -> None:
    """Decode a folder of pictures in parallel with Ray Data: a row is a part of a split and becomes a file.

    A task takes up to four rows, one after the other, while there are two tasks and more for every core: with a task
    for each row, 10,000 small JPEGs took a quarter longer on two cores.
    """
    filesystem, path = _filesystem(folder)
    class_names, rows = listing["class_names"], []
    for split in SPLITS:
        paths, labels = listing[split]
        filesystem.create_dir(f"{path}/{split}")
        parts = max(8, math.ceil(len(paths) / 5000))
        for part in range(parts):
            file = f"{path}/{split}/part-{part:05d}.parquet"
            rows.append({"split": split, "file": file, "paths": paths[part::parts], "labels": labels[part::parts]})

    def decode_and_write(row: dict) -> dict:
        images, kept, failed = sources.decode(row["paths"])
        if kept:
            table = to_table(images, np.asarray(row["labels"])[kept], class_names)
            pq.write_table(table, row["file"], filesystem=filesystem)
        return {"split": row["split"], "failed": json.dumps(failed)}

    failed = {split: [] for split in SPLITS}
    rows_a_task = max(1, min(4, len(rows) // (2 * cluster.cores())))
    with cluster.all_cores_at_once() as compute:
        parts = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / rows_a_task))
        decoded = parts.map(decode_and_write, compute=compute)
    for row in decoded.iter_rows():
        failed[row["split"]] += json.loads(row["failed"])
        if failed[row["split"]] and unreadable == "stop":
            raise DataError(
                f"The picture {failed[row['split']][0]} can't be decoded. Mend or remove it, or set "
                "TUTORIAL_UNREADABLE=skip to leave such pictures out."
            )
    for split, names in failed.items():
        count = len(listing[split][0])
        if len(names) == count:
            raise DataError(f"None of the {count} pictures of the split {split} can be decoded.")
        if names:
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            print(f"Left out {len(names)} of {count} pictures of {split} that can't be decoded: {shown}")


def _folder_name(chosen: settings.Settings) -> str:
    """The prepared data's folder name; for a folder of pictures it changes when they do."""
    if chosen.data in ("digits", "cifar10"):
        return chosen.data
    digest = hashlib.sha256(f"{chosen.data} {chosen.unreadable} {chosen.seed}".encode())
    for entry in sources.fingerprint(chosen.data):
        digest.update(entry.encode())
    return f"{chosen.data_name}-{digest.hexdigest()[:12]}"


def _filesystem(folder: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(folder)


def _delete(folder: str) -> None:
    filesystem, path = _filesystem(folder)
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)
