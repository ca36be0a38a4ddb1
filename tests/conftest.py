"""One local Ray for the tests and notebooks that need it, and settings that no test takes from its machine."""

import contextlib
import os
import random
import re
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest

from support import make_image_folder, ray_processes


def pytest_configure(config):
    """Start from the defaults: a learner's variables and saved choices reach neither tests nor notebooks."""
    for name in [name for name in os.environ if name.startswith("TUTORIAL_")]:
        del os.environ[name]
    config.storage_of_tests = tempfile.mkdtemp(prefix="tutorial-tests-")
    os.environ["TUTORIAL_STORAGE"] = config.storage_of_tests
    os.environ["TUTORIAL_CHOICES"] = f"{config.storage_of_tests}/settings.json"
    config.order = config.getoption("--order") or random.randrange(1, 10000)
    config.minutes_off = []
    config.ray = contextlib.ExitStack()


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


def start_ray(config):
    """Start the Ray that tests and notebooks share, once; the notebooks' kernels find it by RAY_ADDRESS."""
    from run_lessons import shared_ray

    if not os.environ.get("RAY_ADDRESS"):
        config.ray.enter_context(shared_ray())


@pytest.fixture(scope="session")
def shared_ray(request):
    """Ask for this where a test needs Ray, so that the others start none."""
    start_ray(request.config)


def pytest_runtest_setup(item):
    """Start Ray before the first notebook: notebooks can't ask for a fixture."""
    if item.nodeid.endswith(".ipynb"):
        start_ray(item.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """End Ray after the last test, and fail when processes are left."""
    result = yield
    session.config.ray.close()
    _, alive = psutil.wait_procs(ray_processes(), timeout=60)
    if alive:
        pytest.exit(f"left running by the suite: {[process.name() for process in alive]}", returncode=1)
    return result


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
    """List headers that are off by more than a third; machines differ, so that is no failure."""
    if config.minutes_off:
        terminalreporter.section("lessons whose stated minutes are off by more than a third")
        for line in config.minutes_off:
            terminalreporter.line(line)


def pytest_unconfigure(config):
    """Leave nothing behind."""
    shutil.rmtree(config.storage_of_tests, ignore_errors=True)


@pytest.fixture
def image_folder(tmp_path):
    """A folder train/<class>/* and test/<class>/* of two easy classes in several sizes and formats."""
    return make_image_folder(
        tmp_path / "images",
        {"train": 24, "test": 7},
        size=lambda index: (20 + 7 * (index % 5), 24 + 5 * (index % 3)),
        suffixes=("png", "jpg", "JPEG"),
    )
