"""A killed worker or driver costs steps, never an epoch."""

import contextlib
import signal
import subprocess
import sys
import types

import pytest
import ray

from helpers import cluster, faults


@pytest.fixture(scope="module")
def undisturbed():
    return faults.build_short_trainer(faults.new_name(), max_failures=0).fit().return_value


def assert_same(history, undisturbed):
    assert [metrics["epoch"] for metrics in history] == [0, 1, 2]
    for killed, calm in zip(history, undisturbed, strict=True):
        assert killed == pytest.approx(calm, rel=1e-3)


def test_a_killed_worker_goes_on_from_the_checkpoint(undisturbed):
    diary = ray.remote(faults.Diary).options(num_cpus=0).remote([15])
    trainer = faults.build_short_trainer(faults.new_name(), max_failures=1, train_loop=faults.with_faults(diary))
    result = trainer.fit()
    steps = [page["step"] for page in ray.get(diary.read.remote())]
    ray.kill(diary)
    assert steps == [*range(1, 16), *range(13, 19)], "it should go on after step 12, the end of the second epoch"
    assert_same(result.return_value, undisturbed)


def test_without_failures_allowed_the_error_says_what_happened():
    diary = ray.remote(faults.Diary).options(num_cpus=0).remote([2])
    trainer = faults.build_short_trainer(faults.new_name(), max_failures=0, train_loop=faults.with_faults(diary))
    with pytest.raises(ray.train.TrainingFailedError, match="died|killed|SIGKILL"):
        trainer.fit()
    ray.kill(diary)


def test_a_killed_driver_is_gone_on_from(undisturbed):
    name = faults.new_name()
    driver = subprocess.run([sys.executable, "-m", "helpers.faults", name], capture_output=True, text=True)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    resumed = faults.build_short_trainer(name, max_failures=0).fit()
    assert_same(resumed.return_value, undisturbed)


def test_a_folder_that_another_machine_cannot_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "on_one_machine", lambda: False)
    cluster.require_shared(str(tmp_path))  # here every node does see it
    cluster.require_shared("s3://bucket/anywhere")
    hidden = contextlib.nullcontext(types.SimpleNamespace(name=str(tmp_path / "seen-by-nobody")))
    monkeypatch.setattr(cluster.tempfile, "NamedTemporaryFile", lambda **_: hidden)
    with pytest.raises(cluster.ClusterError, match="can't see the storage folder .*: set TUTORIAL_STORAGE to a folder"):
        cluster.require_shared(str(tmp_path))
