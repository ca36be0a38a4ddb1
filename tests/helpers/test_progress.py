"""The progress display shows what workers reported, and when."""

import json
import time
import types

import pytest

from helpers import progress
from helpers.progress import show_progress


@pytest.fixture
def trainer(tmp_path):
    run = types.SimpleNamespace(storage_path=str(tmp_path), name="run")
    workers = types.SimpleNamespace(num_workers=1)
    return types.SimpleNamespace(run_config=run, scaling_config=workers, train_loop_config={"num_epochs": 2})


def report(trainer, epoch, seconds_from_now):
    filesystem, folder = progress.reports_folder(trainer.run_config)
    filesystem.create_dir(folder)
    with filesystem.open_output_stream(f"{folder}/{time.time() + seconds_from_now:.3f}.json") as stream:
        stream.write(json.dumps({"epoch": epoch, "validation_accuracy": 0.5}).encode())


def test_show_progress_marks_epochs_of_a_dead_driver(trainer, capsys):
    report(trainer, 0, seconds_from_now=-100)
    with show_progress(trainer) as display:
        report(trainer, 1, seconds_from_now=7)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2") and first.endswith("before")
    assert second.startswith("epoch 2/2") and second.endswith("7 s")
    assert display.seconds == pytest.approx([7], abs=0.5)


def test_show_progress_interrupted_says_what_to_do(trainer):
    with pytest.raises(KeyboardInterrupt, match="run the lesson again from the cell"), show_progress(trainer):
        raise SystemExit(1)


def test_show_progress_passes_on_what_fit_raised_also_when_the_reports_can_not_be_read(trainer):
    with pytest.raises(RuntimeError, match="of fit()"), show_progress(trainer) as display:
        filesystem, folder = progress.reports_folder(trainer.run_config)
        filesystem.create_dir(folder)
        with filesystem.open_output_stream(f"{folder}/1.000.json") as stream:
            stream.write(b'{"epoch": 0, "validation_acc')
        raise RuntimeError("of fit()")
    assert not display.thread.is_alive()


def test_show_progress_waits_for_a_report_that_is_half_written(trainer, capsys):
    filesystem, folder = progress.reports_folder(trainer.run_config)
    filesystem.create_dir(folder)
    with show_progress(trainer):
        for text in ('{"epoch": 0, "validation_acc', '{"epoch": 0, "validation_accuracy": 0.5}'):
            with filesystem.open_output_stream(f"{folder}/1.000.json") as stream:
                stream.write(text.encode())
            time.sleep(1.5)  # long enough for a look
        assert capsys.readouterr().out.startswith("epoch 1/2   validation accuracy 0.500")
