"""The lessons run unchanged on three hosts, with their storage in a common folder and in a bucket."""

import sys

import nbformat
import pytest

from cluster.on_hosts import notebook, python
from support import NOTEBOOKS

pytestmark = pytest.mark.cluster
EXECUTE = """
import sys
from pathlib import Path

sys.path.insert(0, "tools")
import run_lessons

sys.exit(run_lessons.execute(*map(Path, sys.argv[1:])))
"""
ACCURACY = "from helpers import evaluation, settings; print(evaluation.latest(settings.load())['accuracy'])"
# Lessons 09, 10 and 11 start Ray nodes of their own on the machine of the notebook, also where there is a cluster: what
# they show can't be arranged with other people's machines. Lessons 00 to 02 train nothing, 06 and 13 what 05 does. The
# script that lesson 14 submits is in test_jobs.py.
# To stay below 25 minutes, each of the others has one kind of storage, and 05 both.
RUNS = [("03", "folder"), ("04", "uri"), ("05", "folder"), ("05", "bucket"), ("07", "bucket"), ("08", "folder")]
RUNS += [("12", "bucket")]


@pytest.mark.parametrize(("lesson", "storage"), RUNS)
def test_lesson_on_three_hosts(hosts, tmp_path, lesson, storage):
    (path,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    variables = notebook(hosts, storage)
    done = hosts.run(1, [sys.executable, "-c", EXECUTE, path, tmp_path / path.name], timeout=800, **variables)
    assert done.returncode == 0, done.stdout[-4000:]
    if lesson == "05":
        assert "workers: 3" in nbformat.writes(nbformat.read(tmp_path / path.name, as_version=4))
        assert float(python(hosts, ACCURACY, **variables).split()[-1]) >= 0.98
