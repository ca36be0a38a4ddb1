"""`make run` says which lesson failed and keeps what it printed; `make lab` leaves no JupyterLab behind."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from helpers import evaluation, series, settings

RESULT = {"accuracy": 0.9834, "pictures": 357, "data": "digits", "epochs": 4, "run": "dist-digits"}


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """A series of two lessons in a folder of its own; returns what writes a lesson."""
    monkeypatch.setattr(series, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(series, "REPORT", tmp_path / "report")
    monkeypatch.setattr(evaluation, "latest", lambda chosen: RESULT)

    def write(name, *cells):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(notebook, tmp_path / name)

    write("00_first.ipynb", "print('seen', 6 * 7)")
    write("01_second.ipynb", "print('before')", "print('the last one')")
    write("notes.ipynb", "1 / 0  # no lesson, so not run")
    return write


def test_a_run_ends_with_the_accuracy_and_a_report_of_all_lessons(lessons, tmp_path, capsys):
    series.run_all()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "test accuracy 0.983 (digits, 4 epochs)"
    assert [line.split(" … ")[0] for line in lines[1:3]] == ["00_first", "01_second"]
    index = (tmp_path / "report" / "index.html").read_text()
    assert 'href="00_first.html"' in index and 'href="01_second.html"' in index and "98.3%" in index
    assert "seen 42" in (tmp_path / "report" / "00_first.html").read_text()
    executed = nbformat.read(tmp_path / "report" / "executed" / "01_second.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "the last one\n"
    assert not nbformat.read(tmp_path / "01_second.ipynb", as_version=4).cells[1].outputs, "the lesson itself changed"


def test_a_lesson_that_fails_is_named_with_its_error_and_what_it_printed_is_kept(lessons, tmp_path, capsys):
    lessons("01_second.ipynb", "print('before')", "raise ValueError('no pictures here')", "print('after')")
    with pytest.raises(SystemExit, match=r"01_second failed; see report/01_second\.html"):
        series.run_all()
    assert "ValueError: no pictures here" in capsys.readouterr().out
    executed = nbformat.read(tmp_path / "report" / "executed" / "01_second.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "before\n" and not executed.cells[2].outputs
    assert not (tmp_path / "report" / "index.html").exists(), "a report that is not whole"


def test_jupyterlab_ends_with_the_process_that_started_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "helpers.series", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token="]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=settings.PROJECT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
    assert not answers(port), "JupyterLab goes on without the process that started it"


def answers(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).status == 200
    except OSError:
        return False
