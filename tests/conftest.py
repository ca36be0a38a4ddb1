"""One warm local Ray for all tests and notebooks, and settings that no test takes from the machine it runs on."""

import os
import shutil
import tempfile

import pytest


def pytest_configure(config):
    """Start from the defaults: a reader's variables and saved choices reach neither tests nor notebooks."""
    for name in [name for name in os.environ if name.startswith("TUTORIAL_")]:
        del os.environ[name]
    config.storage_of_tests = tempfile.mkdtemp(prefix="tutorial-tests-")
    os.environ["TUTORIAL_STORAGE"] = config.storage_of_tests
    os.environ["TUTORIAL_CHOICES"] = f"{config.storage_of_tests}/settings.json"


def pytest_collection_modifyitems(items):
    """Run last what looks at the lessons' results."""
    items.sort(key=lambda item: item.get_closest_marker("after_lessons") is not None)


def pytest_unconfigure(config):
    """Leave nothing behind."""
    shutil.rmtree(config.storage_of_tests, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Keep Ray running for as long as tests run; the notebooks' kernels find it by RAY_ADDRESS, as under `make run`."""
    if session.config.option.collectonly:
        return (yield)
    from helpers import cluster

    with cluster.shared():
        return (yield)


@pytest.fixture
def folder_of_pictures(tmp_path):
    """Make a folder train/<class>/*.png and test/<class>/*.png of two easy classes in several sizes and modes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 7)):
        for name, mean in (("dark", 60), ("light", 190)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                size = (20 + 7 * (index % 5), 24 + 5 * (index % 3))
                pixels = rng.normal(mean, 25, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
                picture = Image.fromarray(pixels)
                suffix = ("png", "jpg", "JPEG")[index % 3]
                (picture.convert("L") if index % 4 == 0 else picture).save(folder / f"{index:03d}.{suffix}")
    return tmp_path / "pictures"
