"""`make run` reports every lesson, or the one that failed; `make lab` leaves no JupyterLab behind."""

import contextlib
import socket
import subprocess
import sys
import urllib.request

import nbformat
import pytest

import build_site
import run_lessons
from helpers import evaluation, settings
from support import wait_for

RESULT = {"accuracy": 0.9834, "num_images": 357, "data": "digits", "epochs": 4, "run": "dist-digits"}


@pytest.fixture
def write_lesson(tmp_path, monkeypatch):
    """A series of two lessons in a folder of its own, without Ray; gives what writes a lesson."""
    monkeypatch.setattr(run_lessons, "shared_ray", contextlib.nullcontext)
    monkeypatch.setattr(evaluation, "latest", lambda cfg: RESULT)
    for name in ("README.md", *build_site.PAGES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")

    def write(name, *cells):
        title = nbformat.v4.new_markdown_cell(f"# {name}")
        cells = [title, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / name)

    write("00_first.ipynb", "print('seen', 6 * 7)")
    write("01_second.ipynb", "print('before')", "print('the last one')")
    write("notes.ipynb", "1 / 0  # not a lesson, so not run")
    return write


def executed(project, name):
    return nbformat.read(project / "report" / "executed" / name, as_version=4).cells


@pytest.mark.filterwarnings("ignore:.*is deprecated. Check CHANGES for Sphinx")
def test_run_all_ends_with_the_accuracy_and_a_report(write_lesson, tmp_path, capsys):
    run_lessons.run_all(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "test accuracy 0.983 (digits, 4 epochs)"
    assert [line.split(" … ")[0] for line in lines[1:3]] == ["00_first", "01_second"]
    index = (tmp_path / "report" / "index.html").read_text()
    assert 'href="notebooks/00_first.html"' in index and 'href="notebooks/01_second.html"' in index
    assert "98.3%" in index and "seen 42" in (tmp_path / "report" / "notebooks" / "00_first.html").read_text()
    assert executed(tmp_path, "01_second.ipynb")[2].outputs[0].text == "the last one\n"
    lesson = nbformat.read(tmp_path / "notebooks" / "01_second.ipynb", as_version=4)
    assert not lesson.cells[2].outputs, "the lesson itself changed"


@pytest.mark.parametrize(
    "failure, error",
    [
        ("raise ValueError('no images here')", "ValueError: no images here"),
        ("import os; os._exit(1)", "DeadKernelError: Kernel died"),
    ],
)
def test_run_all_names_the_lesson_that_failed(write_lesson, tmp_path, capsys, failure, error):
    write_lesson("00_first.ipynb", "print('before')", failure, "print('after')")
    with pytest.raises(SystemExit, match=r"^00_first failed; report/executed/00_first\.ipynb holds what it printed"):
        run_lessons.run_all(tmp_path)
    assert error in capsys.readouterr().out
    _, before, _, after = executed(tmp_path, "00_first.ipynb")
    assert before.outputs[0].text == "before\n" and not after.outputs
    with pytest.raises(SystemExit, match="no complete run"):
        build_site.build(tmp_path)


def test_lab_ends_jupyterlab_with_itself(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "tools/run_lessons.py", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token="]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=settings.PROJECT, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or responds(port), seconds=180)
        assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(60)
    assert not responds(port), "JupyterLab outlived the process that started it"


def responds(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).status == 200
    except OSError:
        return False


def test_an_unknown_option_runs_nothing():
    done = subprocess.run([sys.executable, "tools/run_lessons.py", "--nope"], cwd=settings.PROJECT, capture_output=True)
    assert done.returncode == 2 and b"unknown options: --nope" in done.stderr
    assert b"Running" not in done.stdout


def test_make_paths_absolute_holds_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_STORAGE", "out")
    run_lessons.make_paths_absolute()
    monkeypatch.chdir("/")
    assert settings.load().storage == str(tmp_path / "out")
