"""What several tests share: waiting, Ray's processes, image folders, and definitions taken from a notebook."""

import ast
import os
import time
import types
from pathlib import Path

import nbformat
import numpy as np
import psutil
from PIL import Image

from helpers import _ray_internals, settings

NOTEBOOKS = settings.PROJECT / "notebooks"


def wait_for(condition, otherwise="it never became true", seconds=60):
    """Return the first true value of `condition()`, or fail with `otherwise` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)
    return value


def ray_processes():
    """The raylets, their agents and the workers of every Ray that these tests or their lessons started."""
    found = set()
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or [])
        ours = (process.info["environ"] or {}).get("TUTORIAL_CHOICES") == os.environ["TUTORIAL_CHOICES"]
        if ours and _ray_internals.is_ray_process(command):
            found.add(process)
    return found


def make_image_folder(folder, counts, size=(32, 32), suffixes=("png",)):
    """Write `<split>/<class>/<n>.<suffix>` of easy classes: each has a brightness of its own, and noise.

    Args:
        folder: where to.
        counts: images per class by split, such as `{"train": 24, "test": 7}`; the split `""` makes `<class>/` alone.
        size: (width, height), or a function from the image's number to it.
        suffixes: used in turn.
    """
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, mean in (("dark", 60), ("light", 190)):
            class_folder = Path(folder, split, name)
            class_folder.mkdir(parents=True)
            for index in range(count):
                width, height = size(index) if callable(size) else size
                pixels = rng.normal(mean, 25, (height, width, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(class_folder / f"{index:03d}.{suffixes[index % len(suffixes)]}")
    return Path(folder)


def load_definitions(lesson, **names):
    """Return a module with the imports, functions and classes of a lesson, without running its other cells.

    The module is not importable, so Ray pickles its definitions by value, as it does those of a notebook.

    Args:
        lesson: the beginning of the notebook's name, such as "12".
        names: what the definitions use and a cell would have computed.
    """
    (path,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    module = types.ModuleType(f"lesson_{lesson}")
    module.__dict__.update(names)
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "solution" not in cell.metadata.get("tags", []):
            kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
            body = [node for node in ast.parse(cell.source).body if isinstance(node, kept)]
            exec(compile(ast.Module(body, []), str(path), "exec"), module.__dict__)
    return module
