"""The site of two small lessons: complete, searchable, and without a single address outside it."""

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest

from helpers import site

# The reader of Markdown uses what a later builder will not have; the pins of both go together.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Check CHANGES for Sphinx")
v4 = nbformat.v4
needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("myst_nb") is None,
    reason="the site's builder is not installed: pip install -c constraints.txt -e '.[site]'",
)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Page(HTMLParser):
    """What a page loads, where its links lead, which names it has for links to it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loads, self.links, self.names, self.alts, self.next = path, [], [], set(), [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names.add(attributes.get("id"))
        if tag == "a":
            self.links.append(attributes.get("href", ""))
            if "next-page" in attributes.get("class", ""):
                self.next = attributes["href"]
        elif tag == "link":
            self.loads.append(attributes.get("href", ""))
        elif "src" in attributes:
            self.loads.append(attributes["src"])
        if tag == "img":
            self.alts.append(attributes.get("alt"))


def cell(source, count=1, outputs=(), **metadata):
    return v4.new_code_cell(source, execution_count=count, outputs=list(outputs), metadata=metadata)


def stream(text):
    return v4.new_output("stream", name="stdout", text=text)


def picture(metadata):
    return v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}, metadata=metadata)


def make_project(folder):
    """Two lessons that were run, two pages beside them, a README, and a file that a page links to."""
    first = [
        v4.new_markdown_cell(
            "# 00 · First\n\nNext: [01 · Second](01_second.ipynb), [below](#1-·-Try-it). `$HOME`, [code](../helpers/)."
        ),
        cell("print('a quokka')", 1, [stream("a quokka\n")]),
        cell("plot()", 2, [picture({"image/png": {"alt": "Two bars", "width": 900, "height": 300}})]),
        cell("plot()", 3, [picture({})]),
        v4.new_markdown_cell("## 1 · Try it\n\nYour turn."),
        cell("answer = 'wombat'", 4, [stream("Right.\n")], jupyter={"source_hidden": True}, tags=["solution"]),
    ]
    second = [
        v4.new_markdown_cell(
            "# 01 · Second\n\n[Back](00_first.ipynb#1-·-Try-it), [shard](GLOSSARY.md#shard), [start](../README.md)."
        ),
        cell(
            "1 / 0",
            1,
            [v4.new_output("error", ename="ZeroDivisionError", evalue="", traceback=["ZeroDivisionError"])],
            tags=["raises-exception"],
        ),
    ]
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    for place in ("notebooks", "report/executed"):
        (folder / place).mkdir(parents=True)
        for name, cells in (("00_first", first), ("01_second", second)):
            nbformat.write(v4.new_notebook(cells=cells, metadata=language), folder / place / f"{name}.ipynb")
    (folder / "notebooks/GLOSSARY.md").write_text("# Glossary\n\n## Shard\n\nA part. See [first](00_first.ipynb).\n")
    (folder / "notebooks/INSTRUCTORS.md").write_text(
        "# For instructors\n\n[The pins](../constraints.txt), [news](../NEWS.md).\n"
    )
    (folder / "NEWS.md").write_text("# News\n")
    (folder / "notebooks/TROUBLESHOOTING.md").write_text("# Troubleshooting\n\nNothing.\n")
    (folder / "helpers").mkdir()
    (folder / "constraints.txt").write_text("ray\n")
    (folder / "README.md").write_text(
        "# All of it\n\nStart: [first](notebooks/00_first.ipynb).\n\n```\nmake run\n```\n"
    )
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"))
    index = site.build(project)
    assert index == project / "report/site/index.html"
    return {path.relative_to(index.parent).as_posix(): Page(path) for path in index.parent.rglob("*.html")}


@needs_builder
def test_pages_stand_in_order(built):
    order, name = [], "index.html"
    while name:
        order.append(name.removeprefix("notebooks/").removesuffix(".html"))
        following = built[name].next
        name = following and (built[name].path.parent / following).resolve().relative_to(root(built)).as_posix()
    assert order == ["index", "00_first", "01_second", "GLOSSARY", "TROUBLESHOOTING", "INSTRUCTORS"]
    assert "<title>00 · First" in text(built, "notebooks/00_first.html")


@needs_builder
def test_search_knows_the_words_of_a_notebook(built):
    index = (root(built) / "searchindex.js").read_text()
    words = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", index)[1])
    assert words["docnames"][words["terms"]["quokka"]] == "notebooks/00_first"
    # A page from the disk may not fetch another: the results stand without an excerpt.
    assert "SHOW_SEARCH_SUMMARY: false" in (root(built) / "_static/documentation_options.js").read_text()


@needs_builder
def test_nothing_is_loaded_from_elsewhere(built):
    for page in built.values():
        for address in page.loads:
            assert not re.match(r"(\w+:)?//", address), f"{page.path.name} loads {address}"
            assert address.startswith("data:") or local(page, address).exists(), f"{page.path.name} misses {address}"
    for style in root(built).rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


@needs_builder
def test_every_link_leads_somewhere(built):
    pages = {page.path: page for page in built.values()}
    for page in built.values():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            address, _, name = link.partition("#")
            target = local(page, address) if address else page.path
            assert target.exists(), f"{page.path.name} links to {link}"
            assert not name or unquote(name) in pages[target].names, f"{page.path.name} links to {link}"
    assert "00_first.html#try-it" in text(built, "notebooks/01_second.html")
    assert "constraints.txt" in str(built["notebooks/INSTRUCTORS.html"].links)


@needs_builder
def test_a_solution_is_folded_away(built):
    page = text(built, "notebooks/00_first.html")
    folded = re.search(r"<details(?![^>]* open)[^>]*>(.*?)</details>", page, re.DOTALL)[1]
    assert "Show solution" in folded and "wombat" in folded
    assert page.count("<details") == 1 and "a quokka" not in folded


@needs_builder
def test_pictures_have_words(built):
    alts = built["notebooks/00_first.html"].alts
    assert alts[0] == "Two bars" and alts[1] == site.CONFIG["nb_render_image_options"]["alt"]


@needs_builder
def test_a_link_into_nothing_stops_the_build(tmp_path):
    project = make_project(tmp_path)
    (project / "README.md").write_text("# All of it\n\n[Gone](notebooks/99_gone.ipynb)\n")
    with pytest.raises(SystemExit, match="99_gone"):
        site.build(project)
    assert not (project / "report/site").exists()


def test_a_missing_builder_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sphinx.application", None)
    with pytest.raises(SystemExit, match=r"^The site's builder is not installed: `make site` .*\.$"):
        site.build(make_project(tmp_path))


def test_a_lesson_that_was_not_run_is_named(tmp_path):
    project = make_project(tmp_path)
    path = project / "report/executed/01_second.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].execution_count = None
    nbformat.write(notebook, path)
    with pytest.raises(
        SystemExit, match=r"^Cell 2 of report/executed/01_second.ipynb was not run, .* `make run` .*\.$"
    ):
        site.build(project)
    notebook.cells[1].execution_count = 1
    notebook.cells[1].metadata.tags = []
    nbformat.write(notebook, path)
    with pytest.raises(SystemExit, match=r"^Cell 2 of report/executed/01_second.ipynb failed, "):
        site.build(project)
    path.unlink()
    with pytest.raises(SystemExit, match=r"^There is no report/executed/01_second.ipynb .* `make run` makes it\.$"):
        site.build(project)


def test_a_lesson_changed_since_is_mentioned(tmp_path, capsys):
    project = make_project(tmp_path)
    assert list(site.executed_lessons(project)) == ["00_first.ipynb", "01_second.ipynb"]
    assert not capsys.readouterr().out
    nbformat.write(v4.new_notebook(), project / "notebooks/00_first.ipynb")
    site.executed_lessons(project)
    assert "00_first.ipynb has changed since it was run" in capsys.readouterr().out


def root(built):
    return built["index.html"].path.parent


def text(built, name):
    return built[name].path.read_text(encoding="utf-8")


def local(page, address):
    return (page.path.parent / unquote(re.sub(r"[?#].*", "", address))).resolve()
