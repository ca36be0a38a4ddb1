"""Builds the executed lessons and the pages beside them as a site for offline reading: `python -m helpers.site`."""

import io
import re
import shutil
import tempfile
from pathlib import Path

import nbformat

from helpers import settings

STYLE = Path(__file__).with_name("site.css")
# The pages beside the lessons, in this order; others follow by name.
PAGES = ("GLOSSARY.md", "TROUBLESHOOTING.md", "INSTRUCTORS.md")
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s#:]*)(#[^)\s]*)?\)")
CONFIG = {
    "project": "Distributed training with Ray",
    "html_title": "Distributed training with Ray",
    "extensions": ["myst_nb"],
    "highlight_language": "none",  # a fence that names no language is a command line here, not Python
    "myst_heading_anchors": 4,
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_code_prompt_show": "Show the code",
    "nb_code_prompt_hide": "Hide the code",
    "nb_render_image_options": {"alt": "A picture that the cell above drew; the text around it says what it shows."},
    # Both would be loaded from the network; the text of a widget stays.
    "nb_ipywidgets_js": {},
    "nb_mime_priority_overrides": [("html", "application/vnd.jupyter.widget-view+json", None)],
    "html_theme": "furo",  # its fonts and icons are the system's and inline, so that file:// may load everything
    "html_static_path": ["_static"],
    "html_css_files": ["site.css"],
    "html_copy_source": False,
    "html_show_search_summary": False,  # its text would be fetched, which a page from the disk may not do
    "html_use_index": False,
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_theme_options": {
        "top_of_page_buttons": [],
        "light_css_variables": {"color-brand-primary": "#2a6fdb", "color-brand-content": "#2a6fdb"},
        "dark_css_variables": {"color-brand-primary": "#7aa7f0", "color-brand-content": "#7aa7f0"},
    },
}


def build(project: Path = settings.PROJECT) -> Path:
    """Build `report/site` from `report/executed`, `notebooks/*.md` and the README.

    Returns:
        The page to open.

    Raises:
        SystemExit: a lesson was not run to its end, or the builder found something wrong; the message says what.
    """
    lessons = executed_lessons(project)
    with tempfile.TemporaryDirectory() as folder:
        source, pages = Path(folder, "source"), Path(folder, "pages")
        _write_source(project, lessons, source)
        _run_builder(source, pages)
        site = project / "report" / "site"
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(pages, site)
    return site / "index.html"


def executed_lessons(project: Path) -> dict[str, nbformat.NotebookNode]:
    """Read every lesson as it was run, in order.

    Raises:
        SystemExit: a lesson is missing, stopped early or failed.
    """
    lessons = {}
    for lesson in sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        place = f"report/executed/{lesson.name}"
        if not (project / place).exists():
            raise SystemExit(f"There is no {place} to build the site from: `make run` makes it.")
        notebook = nbformat.read(project / place, as_version=4)
        for number, cell in enumerate(notebook.cells, 1):
            if problem := _problem(cell):
                raise SystemExit(f"Cell {number} of {place} {problem}, so the site can't show it: `make run` runs it.")
        if _sources(notebook) != _sources(nbformat.read(lesson, as_version=4)):
            print(f"{lesson.name} has changed since it was run; the site shows what was run.")
        lessons[lesson.name] = notebook
    if not lessons:
        raise SystemExit("There are no lessons in notebooks/ to build a site from.")
    return lessons


def _problem(cell) -> str | None:
    if cell.cell_type != "code" or not cell.source.strip():
        return None
    if cell.execution_count is None:
        return "was not run"
    failed = any(output.output_type == "error" for output in cell.outputs)
    return "failed" if failed and "raises-exception" not in cell.metadata.get("tags", []) else None


def _sources(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells]


def _write_source(project: Path, lessons: dict, source: Path) -> None:
    """Lay out what the builder reads: the project's own tree, with the README as its index."""
    beside = {path.name: path for path in sorted((project / "notebooks").glob("*.md"))}
    beside = {name: beside[name] for name in (*PAGES, *beside) if name in beside}
    (source / "notebooks").mkdir(parents=True)
    (source / "_static").mkdir()
    shutil.copy(STYLE, source / "_static")

    names = {"README.md", *(f"notebooks/{name}" for name in (*lessons, *beside))}
    for name, notebook in lessons.items():
        for cell in notebook.cells:
            _mark(cell)
            if cell.cell_type == "markdown":
                cell.source = _with_links(cell.source, "notebooks", names, project, source)
        nbformat.write(notebook, source / "notebooks" / name)
    for name, path in beside.items():
        text = _with_links(path.read_text(encoding="utf-8"), "notebooks", names, project, source)
        (source / "notebooks" / name).write_text(text, encoding="utf-8")
    text = _with_links((project / "README.md").read_text(encoding="utf-8"), "", names, project, source)
    text += _contents("Lessons", lessons) + _contents("Beside the lessons", beside)
    (source / "index.md").write_text(text, encoding="utf-8")


def _mark(cell) -> None:
    """Write what the builder asks for into the metadata of a cell: a button for a hidden one, words for pictures."""
    options = {}
    if cell.metadata.get("jupyter", {}).get("source_hidden"):
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = [*tags, "hide-cell"]
        if "solution" in tags:
            options |= {"code_prompt_show": "Show solution", "code_prompt_hide": "Hide solution"}
    described = [
        about["alt"]
        for output in cell.get("outputs", [])
        for about in (output.get("metadata", {}).get("image/png", {}), output.get("metadata", {}))
        if "alt" in about
    ]
    if described:
        options["image"] = {"alt": " ".join(dict.fromkeys(described))}
    if options:
        cell.metadata["mystnb"] = options


def _with_links(text: str, folder: str, pages: set[str], project: Path, source: Path) -> str:
    """Let links lead to where the site has their targets.

    A link to a page stays; a file of the project comes along, to be opened from the site; a folder, or a text that is
    no page, is named without a link. What does not exist is left for the builder to complain about.
    """

    def rewrite(match: re.Match) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = (project / folder / target).resolve()
        if not path.is_relative_to(project.resolve()):
            return match[0]
        inside = path.relative_to(project.resolve()).as_posix()
        if inside == "README.md":
            target = target.replace("README.md", "index.md")
        elif target and inside not in pages and path.exists():
            if path.is_dir() or path.suffix in (".md", ".ipynb"):
                return label[1:-1]
            (source / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / inside)
        # JupyterLab and GitHub name the same heading differently; this is GitHub's way, and the builder's.
        anchor = re.sub(r"[^#\w-]", "", anchor.lower())
        return f"{label}({target}{anchor})"

    return LINK.sub(rewrite, text)


def _contents(caption: str, names) -> str:
    if not names:
        return ""
    entries = "\n".join(f"notebooks/{Path(name).stem}" for name in names)
    return f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def _run_builder(source: Path, pages: Path) -> None:
    try:
        from sphinx.application import Sphinx
        from sphinx.util.console import nocolor
        from sphinx.util.docutils import docutils_namespace, patch_docutils
    except ImportError:
        install = "pip install -c constraints.txt -e '.[site]'"
        raise SystemExit(f"The site's builder is not installed: `make site` installs it, or {install}.") from None
    nocolor()
    warnings = io.StringIO()
    with patch_docutils(), docutils_namespace():
        Sphinx(
            srcdir=source,
            confdir=None,
            outdir=pages,
            doctreedir=source.parent / "doctrees",
            buildername="html",
            confoverrides=CONFIG,
            status=None,
            warning=warnings,
        ).build()
    if warnings.getvalue():
        complaints = warnings.getvalue().replace(f"{source}/", "").strip()
        raise SystemExit(f"The site was not built, because of what the builder found:\n{complaints}")


if __name__ == "__main__":
    print(f"The site is built: open {build().relative_to(settings.PROJECT)}, from the disk or through any web server.")
