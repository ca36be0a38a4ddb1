"""Ray's undocumented parts stay in one file, and no lesson misses them where they are gone."""

import contextlib
import os
import subprocess
import sys
import textwrap

import psutil
import pytest
import ray
import ray.util.state

from helpers import _ray_internals
from support import NOTEBOOKS, wait_for

# Put into every process that Python starts: imports by `_ray_internals` of anything in Ray fail, those by Ray do not.
NO_PRIVATE_IMPORTS = """
    import builtins

    original = builtins.__import__

    def refuse(name, globals=None, *args, **kwargs):
        if name.startswith("ray") and (globals or {}).get("__name__") == "helpers._ray_internals":
            raise ImportError(f"{name} is gone in this release of Ray")
        return original(name, globals, *args, **kwargs)

    builtins.__import__ = refuse
"""


@pytest.fixture
def without_private_imports(tmp_path, monkeypatch):
    """Let every Python process that the test starts do without Ray's private modules, in a Ray of its own."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(NO_PRIVATE_IMPORTS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def test_private_imports_are_really_refused(without_private_imports):
    code = """
        import logging
        logging.basicConfig(level=logging.DEBUG)
        from helpers import _ray_internals, cluster
        cluster.connect()
        _ray_internals.prestart_workers(2)
        _ray_internals.remove_orphaned_placement_groups()
        _ray_internals.show_worker_logs(False)
        print("still running")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "still running" in done.stdout
    for name in ("prestart_workers", "remove_orphaned_placement_groups", "show_worker_logs"):
        assert f"{name} is not available in this Ray" in done.stderr


@pytest.mark.parametrize("lesson", ["00", "05"])
def test_lessons_run_without_private_imports(without_private_imports, monkeypatch, lesson):
    monkeypatch.setenv("TUTORIAL_EPOCHS", "2")
    (notebook,) = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--execute", "--to", "notebook", str(notebook)]
    command += ["--output-dir", str(without_private_imports), "--ExecutePreprocessor.timeout=600"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_prestart_workers_starts_the_processes_that_were_asked_for():
    code = """
        from helpers import cluster
        cluster.connect()
        input()
    """
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=alone) as notebook:

        def waiting():
            found = 0
            for process in psutil.Process(notebook.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    found += "ray::IDLE" in " ".join(process.cmdline()[:2])
            return found

        wait_for(lambda: waiting() >= _ray_internals.DATA_WORKERS, "no process was started ahead of time")
        notebook.communicate(b"\n")


def test_a_thread_that_asks_a_local_ray_for_its_dashboard_ends_silently(shared_ray):
    @ray.remote
    def ask():
        try:
            ray.util.state.get_actor("0" * 32)
        except SystemExit as end:  # the one exception of which a thread says nothing
            return str(end)

    assert ray.get(ask.remote()) == "This Ray has no dashboard."


def test_environment_restores_what_was_set(monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "before")
    with _ray_internals.environment({"A_VARIABLE": "inside", "ANOTHER": "inside"}):
        assert (os.environ["A_VARIABLE"], os.environ["ANOTHER"]) == ("inside", "inside")
    assert os.environ["A_VARIABLE"] == "before" and "ANOTHER" not in os.environ


def test_remove_orphaned_placement_groups_frees_those_of_killed_actors_only(shared_ray):
    @ray.remote(num_cpus=0)
    class Creator:
        def create(self):
            self.group = ray.util.placement_group([{"CPU": 0.1}])
            ray.get(self.group.ready())
            return self.group.id.hex()

    def state(group):
        _ray_internals.remove_orphaned_placement_groups()
        return ray.util.placement_group_table()[group]["state"]

    alive, killed = Creator.remote(), Creator.remote()
    kept, orphaned = ray.get([alive.create.remote(), killed.create.remote()])
    ray.kill(killed)
    wait_for(lambda: state(orphaned) == "REMOVED")
    assert state(kept) == "CREATED"
    ray.kill(alive)
    wait_for(lambda: state(kept) == "REMOVED")
