"""The preflight passes on this machine, sees what is wrong, and says how to fix it."""

import shutil
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from helpers import cluster, preflight, settings


def failures(*checks):
    return [check.name for check in preflight.Report(checks).failed]


def test_run_passes_here(shared_ray):
    report = preflight.run()
    assert not report.failed
    lines = repr(report).splitlines()
    assert lines[0] == f"✓ Python               {sys.version.split()[0]}"
    assert [check.name for check in report] == [
        *("Python", "ray", "torch", "torchvision", "CPU cores", "memory", "shared memory", "storage", "GPUs"),
        *("helpers on a worker", "data"),
    ]


def test_report_shows_ticks_notes_crosses_and_remedies():
    report = preflight.Report(
        [
            preflight.Check("a", "well"),
            preflight.Check("b", "old", "Update it.", False),
            preflight.Check("c", "-", "Fix."),
        ]
    )
    assert [line.split() for line in repr(report).splitlines()] == [
        ["✓", "a", "well"],
        ["•", "b", "old"],
        ["→", "Update", "it."],
        ["✗", "c", "-"],
        ["→", "Fix."],
    ]
    assert failures(*report) == ["c"]


def test_package_of_another_version_is_a_note(monkeypatch):
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda name: "0.1+cpu")
    check = preflight.package("ray")
    assert "constraints.txt" in check.remedy and check.found == "0.1+cpu" and not failures(check)


def test_package_of_the_tested_version_passes():
    assert not preflight.package("ray").remedy


def test_package_without_constraints_passes(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "PROJECT", tmp_path)
    assert not preflight.package("ray").remedy


def test_cores_notes_a_single_one(monkeypatch):
    monkeypatch.setattr(preflight.ray, "cluster_resources", lambda: {"CPU": 6.0})
    for count, said in ((1, "twice as long"), (2, "")):
        monkeypatch.setattr(cluster, "cores", lambda count=count: count)
        check = preflight.cores()
        assert said in check.remedy and bool(check.remedy) == (count == 1) and not failures(check)
        assert check.found == f"{count} here; Ray schedules with 6 logical CPUs"


def test_memory_that_is_too_small_fails(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    check = preflight.memory()
    assert failures(check) and check.found == "1.0 GiB available" and "until 3 GiB are available" in check.remedy


def test_shared_memory_that_is_too_small_fails(monkeypatch):
    monkeypatch.setattr(preflight.Path, "exists", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    check = preflight.shared_memory()
    assert failures(check) and "--shm-size=2g" in check.remedy


def test_shared_memory_is_not_needed_everywhere(monkeypatch):
    monkeypatch.setattr(preflight.Path, "exists", lambda path: False)
    assert not failures(preflight.shared_memory())


def test_storage_that_can_not_be_written_fails(tmp_path):
    (tmp_path / "file").write_text("")
    check = preflight.storage(settings.Settings(storage=str(tmp_path / "file" / "below")))
    assert failures(check) and "can't be written" in check.found and "TUTORIAL_STORAGE" in check.found


def test_storage_that_is_too_small_fails(tmp_path):
    check = preflight.storage(settings.Settings(storage=str(tmp_path)), needed=2**40)
    assert failures(check) and "set TUTORIAL_STORAGE to a larger disk" in check.remedy


def test_storage_in_a_bucket_is_written_to(shared_ray, tmp_path):
    check = preflight.storage(settings.Settings(storage=f"file://{tmp_path}/bucket"))
    assert not failures(check) and check.found == f"file://{tmp_path}/bucket"
    (tmp_path / "file").touch()
    check = preflight.storage(settings.Settings(storage=f"file://{tmp_path}/file/below"))
    assert failures(check) and "can't write" in check.found


@pytest.mark.parametrize(
    ("count", "cuda", "one_machine", "fails"),
    [(0, False, True, False), (2, True, True, False), (2, False, True, True), (2, False, False, False)],
)
def test_gpus_that_pytorch_can_not_use_fail(monkeypatch, count, cuda, one_machine, fails):
    monkeypatch.setattr(preflight.ray, "cluster_resources", lambda: {"CPU": 6.0, "GPU": count})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(cluster, "on_one_machine", lambda: one_machine)
    check = preflight.gpus()
    assert bool(failures(check)) == fails
    assert ("CUDA_VISIBLE_DEVICES" in check.remedy) == fails


def test_helpers_on_a_worker_that_does_not_answer_fail(shared_ray):
    check = preflight.helpers_on_a_worker(seconds=0)
    assert failures(check) and check.found and "pip install -e ." in check.remedy
