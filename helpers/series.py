"""Runs the lessons in order and turns them into a report to open: `python -m helpers.series`."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

from helpers import cluster, evaluation, settings

NOTEBOOKS = settings.PROJECT / "notebooks"
REPORT = settings.PROJECT / "report"


def lessons() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def run_all() -> None:
    """Execute every lesson, write the report, and print the trained model's test accuracy as the last line.

    Raises:
        SystemExit: a lesson failed; its error and the place of the partly executed notebook are printed.
    """
    settings.make_paths_absolute()
    chosen = settings.load()
    shutil.rmtree(REPORT, ignore_errors=True)
    (REPORT / "executed").mkdir(parents=True)
    rows = []
    print(f"Running {len(lessons())} lessons on {chosen.data_name}, {chosen.epochs} epochs. Starting Ray …")
    started = time.monotonic()
    with cluster.shared():
        for lesson in lessons():
            print(f"{lesson.stem} …", end=" ", flush=True)
            begin = time.monotonic()
            error = _execute(lesson)
            seconds = time.monotonic() - begin
            rows.append((lesson.stem, seconds))
            if error:
                print(f"failed after {seconds:.0f} s\n\n{error}")
                raise SystemExit(f"{lesson.stem} failed; see report/{lesson.stem}.html for all that it printed.")
            print(f"{seconds:.0f} s")
    result = evaluation.latest(chosen)
    _write_index(rows, result)
    print(f"All lessons took {(time.monotonic() - started) / 60:.1f} minutes. Report: report/index.html")
    print(f"test accuracy {result['accuracy']:.3f} ({result['data']}, {result['epochs']} epochs)")


def lab() -> None:
    """Open JupyterLab on the lessons, with one Ray running for all of them; it ends with JupyterLab."""
    settings.make_paths_absolute()
    print("Starting Ray for all lessons, then JupyterLab …")
    with cluster.shared():
        jupyter = [sys.executable, "-m", "jupyter"]
        # Its news ask the network, and whether they may.
        news = "@jupyterlab/apputils-extension:announcements"
        subprocess.run([*jupyter, "labextension", "disable", "--level=sys_prefix", news], capture_output=True)
        command = [*jupyter, "lab", f"--notebook-dir={NOTEBOOKS}"]
        command += ["--LabApp.default_url=/lab/tree/00_start_here.ipynb", *sys.argv[2:]]
        process = subprocess.Popen(command)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # or JupyterLab would outlive this process
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                continue  # JupyterLab got it too and asks whether to stop


def _execute(lesson: Path) -> str | None:
    """Execute one lesson into the report; return the error's text, or None when all went well."""
    notebook = nbformat.read(lesson, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,
        resources={"metadata": {"path": str(lesson.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # or each kernel warns about its local port
        coalesce_streams=True,  # or lines of one table are as many outputs as were flushed
    )
    try:
        client.execute()
        return None
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    finally:
        nbformat.write(notebook, REPORT / "executed" / lesson.name)
        # Readable without network, and wherever the file is sent to.
        exporter = HTMLExporter(require_js_url="", mathjax_url="", mermaid_js_url="", embed_images=True)
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": lesson.stem, "path": str(lesson.parent)}})
        (REPORT / f"{lesson.stem}.html").write_text(page.replace(".ipynb", ".html"), encoding="utf-8")


def _write_index(rows: list[tuple[str, float]], result: dict) -> None:
    items = "\n".join(
        f'<tr><td><a href="{name}.html">{name.replace("_", " ")}</a></td><td>{seconds:.0f} s</td></tr>'
        for name, seconds in rows
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Distributed training with Ray: report</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem; }}
  :root {{ color-scheme: light dark }}
  table {{ border-collapse: collapse; width: 100% }}
  td {{ padding: .4rem 0; border-bottom: 1px solid #8886 }}
  td + td {{ text-align: right }}
  strong {{ font-size: 2rem }}
</style>
<h1>Distributed training with Ray</h1>
<p><strong>{result["accuracy"]:.1%}</strong> of the {result["pictures"]:,} held-out pictures of
{result["data"]} are recognised after {result["epochs"]} epochs.</p>
<table>{items}</table>
<p>The executed notebooks are in <code>executed/</code>; the run is <code>{result["run"]}</code>.</p>
</html>
"""
    (REPORT / "index.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    lab() if sys.argv[1:2] == ["lab"] else run_all()
