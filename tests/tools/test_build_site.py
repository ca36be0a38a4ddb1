"""The report is complete, searchable, and loads nothing from elsewhere."""

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest

import build_site
import conf
from helpers import settings

# MyST uses parts of Sphinx that a later Sphinx will not have; their pins go together.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated. Check CHANGES for Sphinx")
v4 = nbformat.v4
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WIDGET, WIDGET_STATE = (f"application/vnd.jupyter.widget-{part}+json" for part in ("view", "state"))
WIDGETS = {"state": {"1": {"model_name": "HTMLModel", "state": {}}}, "version_major": 2, "version_minor": 0}
RESULT = {"accuracy": 0.9834, "num_images": 1357, "data": "digits", "epochs": 4, "run": "dist-digits-1"}


class Page(HTMLParser):
    """What a page loads, where its links lead, and which anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loads, self.links, self.anchors, self.alts, self.next = path, [], [], set(), [], None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
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

    def target(self, address):
        return (self.path.parent / unquote(re.sub(r"[?#].*", "", address))).resolve() if address else self.path


def code(source, *outputs, **metadata):
    return v4.new_code_cell(source, execution_count=1, outputs=list(outputs), metadata=metadata)


def stream(text):
    return v4.new_output("stream", name="stdout", text=text)


def plot(metadata):
    return v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}, metadata=metadata)


def write_run(project, lessons):
    """Write executed lessons, notebooks by name, and the record of their run."""
    executed = project / build_site.EXECUTED
    executed.mkdir(parents=True)
    for name, notebook in lessons.items():
        nbformat.write(notebook, executed / f"{name}.ipynb")
    record = {"result": RESULT, "seconds": {name: 12.34 for name in lessons}}
    (executed / build_site.RUN).write_text(json.dumps(record))


def make_project(folder):
    """Two lessons that were run, all pages, and a file and a folder that pages link to."""
    first = [
        v4.new_markdown_cell("# 00 · First\n\nNext: [01](01_second.ipynb), [below](#1-·-Try-it), [code](../helpers/)."),
        code("print('a quokka')", stream("a quokka\n")),
        code("plot()", plot({"image/png": {"alt": "Two bars", "width": 900, "height": 300}})),
        code("plot()", plot({})),
        code("dataset", v4.new_output("display_data", {WIDGET: {"model_id": "1"}, "text/plain": "Dataset(rows=7)"})),
        v4.new_markdown_cell("## 1 · Try it\n\nYour turn."),
        code("answer = 'wombat'", stream("Right.\n"), jupyter={"source_hidden": True}, tags=["solution"]),
    ]
    second = [
        v4.new_markdown_cell(
            "# 01 · Second\n\n[Back](00_first.ipynb#1-·-Try-it), [shard](GLOSSARY.md#shard), [start](../README.md)."
        )
    ]
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}, "widgets": {WIDGET_STATE: WIDGETS}}
    lessons = {"00_first": first, "01_second": second}
    lessons = {name: v4.new_notebook(cells=cells, metadata=language) for name, cells in lessons.items()}
    write_run(folder, lessons)
    for name in ("notebooks", "docs", "helpers"):
        (folder / name).mkdir()
    for name in lessons:
        (folder / "notebooks" / f"{name}.ipynb").touch()
    pages = {
        "notebooks/GLOSSARY.md": "# Glossary\n\n## Shard\n\nA part. See [first](00_first.ipynb).\n",
        "notebooks/TROUBLESHOOTING.md": "# Troubleshooting\n\nNothing.\n",
        "docs/INSTRUCTORS.md": "# For instructors\n\n[The pins](../constraints.txt), [news](../NEWS.md).\n",
        "docs/PERFORMANCE.md": "# Performance\n\nFast.\n",
        "CONTRIBUTING.md": "# Contributing\n\n[Glossary](notebooks/GLOSSARY.md)\n",
        "NEWS.md": "# News\n",
        "constraints.txt": "ray\n",
        "README.md": "# All of it\n\nStart: [first](notebooks/00_first.ipynb).\n\n```\nmake run\n```\n",
    }
    for name, text in pages.items():
        (folder / name).write_text(text)
    return folder


def pages_of(index):
    return {path.relative_to(index.parent).as_posix(): Page(path) for path in index.parent.rglob("*.html")}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"))
    (project / "report" / "bench.md").touch()
    (project / "report" / "notebooks").mkdir()
    (project / "report" / "notebooks" / "of_an_earlier_run.html").touch()
    return pages_of(build_site.build(project))


@pytest.fixture(scope="module")
def real_pages(tmp_path_factory):
    """The report of the series itself, from lessons without outputs."""
    project = tmp_path_factory.mktemp("series")
    others = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "storage", "report", "kit*")
    shutil.copytree(settings.PROJECT, project, dirs_exist_ok=True, ignore=others)
    lessons = sorted((project / "notebooks").glob("*.ipynb"))
    write_run(project, {lesson.stem: nbformat.read(lesson, as_version=4) for lesson in lessons})
    return pages_of(build_site.build(project))


def assert_works_offline(pages):
    for page in pages.values():
        for address in page.loads:
            assert not re.match(r"(\w+:)?//", address), f"{page.path.name} loads {address}"
            assert address.startswith("data:") or page.target(address).exists(), f"{page.path.name} misses {address}"
    for style in pages["index.html"].path.parent.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


def assert_links_lead_somewhere(pages):
    by_path = {page.path: page for page in pages.values()}
    for page in pages.values():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            address, _, anchor = link.partition("#")
            target = page.target(address)
            assert target.exists(), f"{page.path.name} links to {link}"
            assert not anchor or unquote(anchor) in by_path[target].anchors, f"{page.path.name} links to {link}"


def test_build_puts_pages_in_order(pages):
    order, page = [], pages["index.html"]
    by_path = {page.path: name for name, page in pages.items()}
    while page:
        order.append(by_path[page.path].removesuffix(".html"))
        page = page.next and pages[by_path[page.target(page.next)]]
    assert order == [
        "index",
        "notebooks/00_first",
        "notebooks/01_second",
        *[page.removesuffix(".md") for page in build_site.PAGES],
    ]
    assert "<title>00 · First" in pages["notebooks/00_first.html"].text


def test_build_begins_with_the_result(pages):
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", pages["index.html"].text))
    for shown in (
        "Test accuracy 98.3%",
        "1,357 test images of digits after 4 epochs",
        "dist-digits-1",
        "00 · First 12",
    ):
        assert shown in words
        assert words.index("All of it") < words.rindex(shown) < words.index("make run")


def test_build_replaces_what_is_there_and_keeps_the_rest(pages):
    report = pages["index.html"].path.parent
    assert (report / "bench.md").exists() and (report / "executed" / "00_first.ipynb").exists()
    assert "notebooks/of_an_earlier_run.html" not in pages


def test_build_makes_notebooks_searchable(pages):
    static = pages["index.html"].path.parent / "_static"
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", (static.parent / "searchindex.js").read_text())[1])
    assert index["docnames"][index["terms"]["quokka"]] == "notebooks/00_first"
    # A page opened from the disk may not fetch another: results come without an excerpt.
    assert "SHOW_SEARCH_SUMMARY: false" in (static / "documentation_options.js").read_text()


def test_build_works_offline(pages):
    assert_works_offline(pages)


def test_build_leads_links_somewhere(pages):
    assert_links_lead_somewhere(pages)
    assert "00_first.html#try-it" in pages["notebooks/01_second.html"].text
    assert any("constraints.txt" in link for link in pages["docs/INSTRUCTORS.html"].links)


def test_build_folds_solutions(pages):
    text = pages["notebooks/00_first.html"].text
    folded = re.search(r"<details(?![^>]* open)[^>]*>(.*?)</details>", text, re.DOTALL)[1]
    assert "Show solution" in folded and "wombat" in folded
    assert text.count("<details") == 1 and "a quokka" not in folded


def test_build_shows_the_text_of_a_widget(pages):
    assert "Dataset(rows=7)" in pages["notebooks/00_first.html"].text


def test_build_describes_images(pages):
    assert pages["notebooks/00_first.html"].alts[:2] == ["Two bars", conf.nb_render_image_options["alt"]]


def test_build_renders_the_pages_of_the_series(real_pages):
    assert_works_offline(real_pages)
    assert_links_lead_somewhere(real_pages)
    assert all(alt for page in real_pages.values() for alt in page.alts), "an image without a description"


def test_build_stops_at_a_broken_link(tmp_path, capfd):
    project = make_project(tmp_path)
    (project / "README.md").write_text("# All of it\n\n[Gone](notebooks/99_gone.ipynb)\n")
    with pytest.raises(SystemExit, match="was not built"):
        build_site.build(project)
    assert "99_gone" in capfd.readouterr().err
    assert not (project / "report" / "index.html").exists()


def test_build_needs_a_complete_run(tmp_path):
    project = make_project(tmp_path)
    (project / build_site.EXECUTED / build_site.RUN).unlink()
    with pytest.raises(SystemExit, match="no complete run in report/executed/: `make run`"):
        build_site.build(project)
