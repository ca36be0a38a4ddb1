"""Builds the report, a site that works offline, from the executed lessons and the project's pages: `make site`."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from helpers import settings

EXECUTED = "report/executed"  # the lessons with their outputs, and RUN, which is written when all of them succeeded
RUN = "run.json"
PAGES = ["notebooks/GLOSSARY.md", "notebooks/TROUBLESHOOTING.md", "docs/INSTRUCTORS.md", "docs/PERFORMANCE.md"]
PAGES += ["CONTRIBUTING.md"]
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s#:]*)(#[^)\s]*)?\)")


def build(project: Path = settings.PROJECT) -> Path:
    """Build the site in `report/` and return its first page.

    Raises:
        SystemExit: no complete run is there, or Sphinx found something wrong.
    """
    try:
        run = json.loads((project / EXECUTED / RUN).read_text())
    except FileNotFoundError:
        raise SystemExit(f"There is no complete run in {EXECUTED}/: `make run` runs all lessons.") from None
    report = project / "report"
    with tempfile.TemporaryDirectory() as folder:
        source, site = Path(folder, "source"), Path(folder, "site")
        stage(project, run, source)
        options = ["-q", "-W", "-c", str(Path(__file__).parent), "-d", f"{folder}/doctrees"]
        if build_main([*options, str(source), str(site)]):
            raise SystemExit("The report was not built: Sphinx's messages above say why.")
        for entry in site.iterdir():
            shutil.rmtree(report / entry.name, ignore_errors=True)
        shutil.copytree(site, report, dirs_exist_ok=True)
    return report / "index.html"


def stage(project: Path, run: dict, source: Path) -> None:
    """Write what Sphinx reads: the executed lessons, the pages, and the README under this run's result as index."""
    lessons = [f"notebooks/{name}.ipynb" for name in run["seconds"]]
    site_pages = {*lessons, *PAGES}

    def with_links(text: str, page: str) -> str:
        return LINK.sub(lambda match: _link(match, project, source, page, site_pages), text)

    def write(page: str, text: str) -> None:
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        (source / page).write_text(text, encoding="utf-8")

    for page in lessons:
        notebook = nbformat.read(project / EXECUTED / Path(page).name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = with_links(cell.source, page)
            else:
                _mark(cell)
        write(page, nbformat.writes(notebook))
    for page in PAGES:
        write(page, with_links((project / page).read_text(encoding="utf-8"), page))
    title, _, text = (project / "README.md").read_text(encoding="utf-8").partition("\n")
    contents = _contents("Lessons", lessons) + _contents("Pages", PAGES)
    write("index.md", f"{title}\n\n{_result(run)}\n{with_links(text, 'README.md')}\n\n{contents}")


def _link(match: re.Match, project: Path, source: Path, page: str, site_pages: set[str]) -> str:
    """Rewrite one link so that it works in the site, and copy the file that it leads to.

    Folders, and Markdown files that are not pages, lose their link. Sphinx complains about what does not exist.
    """
    label, target, anchor = match[1], match[2], match[3] or ""
    # JupyterLab and GitHub name headings differently. Sphinx does it as GitHub does.
    anchor = re.sub(r"[^#\w-]", "", anchor.lower())
    path = (project / page).parent.joinpath(target).resolve()
    if target and path.exists() and path.is_relative_to(project.resolve()):
        name = path.relative_to(project.resolve()).as_posix()
        if name == "README.md":
            target = target.replace("README.md", "index.md")
        elif path.is_dir() or (path.suffix in (".md", ".ipynb") and name not in site_pages):
            return label[1:-1]
        elif name not in site_pages:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / name)
    return f"{label}({target}{anchor})"


def _mark(cell: nbformat.NotebookNode) -> None:
    """Write into the cell's metadata what MyST-NB looks for: a button for a hidden cell, words for images."""
    options = {}
    if cell.metadata.get("jupyter", {}).get("source_hidden"):
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = [*tags, "hide-cell"]
        if "solution" in tags:
            options |= {"code_prompt_show": "Show solution", "code_prompt_hide": "Hide solution"}
    metadata = [output.get("metadata", {}) for output in cell.get("outputs", [])]
    alts = [about["alt"] for one in metadata for about in (one.get("image/png", {}), one) if "alt" in about]
    if alts:
        options["image"] = {"alt": " ".join(dict.fromkeys(alts))}
    if options:
        cell.metadata["mystnb"] = options


def _result(run: dict) -> str:
    rows = "\n".join(f"| [](notebooks/{name}.ipynb) | {seconds:.0f} |" for name, seconds in run["seconds"].items())
    sentence = "**Test accuracy {accuracy:.1%}** on the {num_images:,} test images of {data} after {epochs} epochs"
    sentence = sentence.format(**run["result"]) + f", in the run `{run['result']['run']}`."
    table = f"| lesson | seconds |\n| --- | ---: |\n{rows}"
    return f"```{{admonition}} This run\n:class: tip\n\n{sentence}\n\n{table}\n```\n"


def _contents(caption: str, pages) -> str:
    names = "\n".join(page.rpartition(".")[0] for page in pages)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n\n"


if __name__ == "__main__":
    print(f"The report is built: open {build().relative_to(settings.PROJECT)}, from the disk or through a web server.")
