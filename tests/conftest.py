"""One warm local Ray for all tests and notebooks, and settings that no test takes from the machine it runs on."""

import os
import random
import re
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest


def pytest_configure(config):
    """Start from the defaults: a reader's variables and saved choices reach neither tests nor notebooks."""
    for name in [name for name in os.environ if name.startswith("TUTORIAL_")]:
        del os.environ[name]
    config.storage_of_tests = tempfile.mkdtemp(prefix="tutorial-tests-")
    os.environ["TUTORIAL_STORAGE"] = config.storage_of_tests
    os.environ["TUTORIAL_CHOICES"] = f"{config.storage_of_tests}/settings.json"
    config.order = config.getoption("--order") or random.randrange(1, 10000)
    config.minutes_off = []


def pytest_addoption(parser):
    """Let a maintainer repeat an order of lessons that failed."""
    parser.addoption("--order", type=int, help="the seed of the random order in which the lessons run")


def pytest_report_header(config):
    """Name the seed."""
    return f"the lessons run in random order; repeat this one with --order {config.order}"


def pytest_collection_modifyitems(config, items):
    """Run the lessons in random order, since each must run alone, and last what looks at their results."""
    lessons = [item for item in items if item.nodeid.endswith(".ipynb")]
    others = [item for item in items if item not in lessons]
    random.Random(config.order).shuffle(lessons)
    others.sort(key=lambda item: item.get_closest_marker("after_lessons") is not None)
    first_after = next((n for n, item in enumerate(others) if item.get_closest_marker("after_lessons")), len(others))
    items[:] = others[:first_after] + lessons + others[first_after:]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Compare a lesson's running time with the one in its header."""
    report = yield
    if report.when == "call" and report.passed and item.nodeid.endswith(".ipynb"):
        stated = seconds_stated(Path(item.path).read_text())
        if not stated / 1.33 <= report.duration <= stated * 1.33:
            line = f"{item.path.stem} took {report.duration:.0f} s here, and its header says {stated:.0f} s"
            item.config.minutes_off.append(line)
    return report


def seconds_stated(text):
    """Read "about 2.5 minutes to run" or "about 30 seconds to run"."""
    number, unit = re.search(r"about (\d+(?:\.\d+)?) (second|minute)s? to run", text).groups()
    return float(number) * (60 if unit == "minute" else 1)


def pytest_terminal_summary(terminalreporter, config):
    """Tell of headers that are off by more than a third; machines differ, so that is no failure."""
    if config.minutes_off:
        terminalreporter.section("lessons whose stated minutes are off by more than a third")
        for line in config.minutes_off:
            terminalreporter.line(line)


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
        result = yield
    _, alive = psutil.wait_procs(ray_processes(), timeout=20)
    if alive:
        pytest.exit(f"left running by the suite: {[process.name() for process in alive]}", returncode=1)
    return result


def ray_processes():
    """The raylets, their agents and the workers of every Ray that these tests or their lessons started."""
    found = set()
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or [])
        ours = (process.info["environ"] or {}).get("TUTORIAL_CHOICES") == os.environ["TUTORIAL_CHOICES"]
        if ours and any(sign in command for sign in ("ray::", "/ray/core/", "/ray/_private/", "/ray/dashboard/")):
            found.add(process)
    return found


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
