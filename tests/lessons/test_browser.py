"""JupyterLab in a real browser: a learner runs two lessons, sees plots and progress, and answers an exercise."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request

import pytest

from helpers import settings
from support import wait_for

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to open JupyterLab in")


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    """Start JupyterLab on a copy of the lessons, as `make lab` does; give its address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(settings.PROJECT / "notebooks", folder / "notebooks")
    # All cells stay in the page, also those out of sight; no news, which ask the network.
    write_setting(folder, "notebook-extension/tracker", {"windowingMode": "none"})
    write_setting(folder, "apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--notebook-dir={folder / 'notebooks'}"]
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "TUTORIAL_EPOCHS": "2",
    }
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or responds(address))
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(30)


def write_setting(folder, name, values):
    file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def responds(address):
    try:
        return urllib.request.urlopen(f"{address}/api", timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Lesson:
    """A lesson open in JupyterLab."""

    def __init__(self, browser, address, name):
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?reset", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
        # Who runs cells before there is a kernel is asked which one, in a dialog over everything.
        self.page.wait_for_selector(".jp-Toolbar-kernelName:has-text('Python 3')", timeout=60_000)
        idle = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
        self.page.wait_for_selector(idle, state="attached", timeout=60_000)

    def prompts(self):
        return self.page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()

    def start_all(self):
        for _ in range(5):  # JupyterLab shows its menus before they work
            self.page.click("#jp-MainMenu li:has-text('Run') >> nth=0")
            self.page.click(".lm-Menu-item:has-text('Run All Cells') >> nth=0")
            with contextlib.suppress(AssertionError):
                return wait_for(lambda: any(re.search(r"[*\d]", prompt) for prompt in self.prompts()), seconds=15)

    def finish(self, seconds=300):
        """Wait until the last cell has run."""
        wait_for(lambda: re.search(r"\d", self.prompts()[-1]) or self.errors(), seconds=seconds)
        assert not self.errors()

    def output(self, cell):
        return "\n".join(cell.locator(".jp-OutputArea-output").all_text_contents())

    def cell(self, code):
        return self.page.locator(".jp-CodeCell", has_text=code).first

    def answer(self, code, expected):
        """Put `code` into the exercise's cell and run it; wait for the check to say what is expected."""
        self.page.locator(".cm-content", has_text="worker_ids = ").first.click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.insert_text(f"worker_ids = {code}\nprint(exercises.check_worker_ids(worker_ids))")
        self.page.keyboard.press("Control+Enter")
        wait_for(lambda: expected in self.output(self.cell("worker_ids = ")))

    def errors(self):
        kinds = ("application/vnd.jupyter.stderr", "application/vnd.jupyter.error")
        found = [self.page.locator(f'.jp-OutputArea-output[data-mime-type="{kind}"]') for kind in kinds]
        return [text for outputs in found for text in outputs.all_text_contents()]


def test_lesson_00_and_its_exercise(browser, jupyterlab):
    lesson = Lesson(browser, jupyterlab, "00_start_here")
    lesson.start_all()
    lesson.finish()
    assert "✓ Python" in lesson.output(lesson.cell("preflight.run()"))
    assert "Not done yet" in lesson.output(lesson.cell("worker_ids = "))
    lesson.answer("lambda task: [task.remote() for _ in range(4)]", expected="pass the list to ray.get()")
    lesson.answer("lambda task: ray.get([task.remote() for _ in range(4)])", expected="Right:")
    lesson.page.close()


def test_lesson_05_shows_progress_and_plots(browser, jupyterlab):
    lesson = Lesson(browser, jupyterlab, "05_fit")
    lesson.start_all()
    training = lesson.cell("show_progress(trainer) as display")
    # The display moves while it trains.
    wait_for(
        lambda: re.search(r"epoch 1/2 .*validation accuracy[^…]*epoch 2/2 is running …", lesson.output(training)),
        seconds=200,
    )
    lesson.finish()
    assert re.search(r"fit\(\) took \d+ s in total", lesson.output(training))
    plots = lesson.page.locator(".jp-OutputArea-output img")
    assert plots.count() >= 2
    assert all(plots.evaluate_all("(images) => images.map((image) => image.complete && image.naturalWidth > 300)"))
    lesson.page.close()
