"""The pages around the lessons: short, licensed, in the field's own words, and with links that lead somewhere."""

import json
import re
import tomllib

import jsonschema
import nbformat
import pytest

from helpers import settings
from support import NOTEBOOKS

PAGES = sorted(
    path for folder in (settings.PROJECT, settings.PROJECT / "docs", NOTEBOOKS) for path in folder.glob("*.md")
)
LESSONS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
RETIRED = {
    "picture": r"\bpictur\w+",
    "mend": r"\bmend(s|ed|ing)?\b",
    "anew": r"\banew\b",
    "beside": r"\bbesides?\b",
    "for ever": r"\bfor ever\b",
    "a second for per second": r"\b(once|twice|times|images|rows|batch(es)?|steps|calls|[MG]i?B|\d[\d,.]*) a second\b",
}
DOCUMENTATION = ("https://docs.ray.io/", "https://docs.pytorch.org/", "https://pytorch.org/")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^)\s]+)\)")
# The keys used here, with their types and limits in schemas/devContainer.base.schema.json of devcontainers/spec as of
# January 2024; `customizations.vscode` is Visual Studio Code's own.
STRINGS = {"type": "array", "items": {"type": "string"}}
DEVCONTAINER = {
    "type": "object",
    "required": ["image", "postCreateCommand", "hostRequirements"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "runArgs": STRINGS,
        "postCreateCommand": {"type": "string"},
        "waitFor": {
            "enum": [
                "initializeCommand",
                "onCreateCommand",
                "updateContentCommand",
                "postCreateCommand",
                "postStartCommand",
            ]
        },
        "hostRequirements": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "cpus": {"type": "integer", "minimum": 1},
                "memory": {"type": "string", "pattern": r"^\d+([tgmk]b)?$"},
                "storage": {"type": "string", "pattern": r"^\d+([tgmk]b)?$"},
            },
        },
        "forwardPorts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 65535}},
        "portsAttributes": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "label": {"type": "string"},
                    "onAutoForward": {
                        "enum": ["notify", "openBrowser", "openBrowserOnce", "openPreview", "silent", "ignore"]
                    },
                },
            },
        },
        "customizations": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "vscode": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"extensions": STRINGS, "settings": {"type": "object"}},
                }
            },
        },
    },
}


def prose(text):
    """Markdown without code, and without the targets of its links."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", text))


def markdown_of(path):
    """The text of a page, or of a lesson's Markdown cells."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(text):
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read_more(lesson):
    """The links to the web below the last `**Read more:**` of a lesson, up to the next heading or bold sentence."""
    before, found, after = markdown_of(lesson).rpartition("**Read more:**")
    assert found, f"{lesson.name} has no section that starts with **Read more:**"
    assert "## What you learned" in before, f"{lesson.name}: **Read more:** belongs after What you learned"
    links = LINK.findall(re.split(r"^(?:#|\*\*)", after, flags=re.MULTILINE)[0])
    return [link for link in links if "://" in link]


def by_name(path):
    return path.relative_to(settings.PROJECT).as_posix()


def test_readme_is_short():
    text = (settings.PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 1000


def test_readme_shows_something_distributed_and_describes_it():
    ((words, image),) = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", (settings.PROJECT / "README.md").read_text())
    assert (settings.PROJECT / image).is_file()
    assert len(words) > 60 and "workers" in words


def test_readme_lists_every_setting():
    text = (settings.PROJECT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"TUTORIAL_(\w+)", text))
    assert named == {name.upper() for name in settings.Settings.__dataclass_fields__}
    for name, default in re.findall(r"^\| `TUTORIAL_(\w+)` \| `?([^|`]+?)`? \|", text, re.MULTILINE):
        if name != "STORAGE" and default != "what it is":
            assert str(settings.Settings.__dataclass_fields__[name.lower()].default) == default, name


def test_license_is_apache_and_named_in_pyproject():
    text = (settings.PROJECT / "LICENSE").read_text(encoding="utf-8")
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004\s", text)
    assert "END OF TERMS AND CONDITIONS" in text and "Copyright 2026 the authors of this series" in text
    assert "[yyyy]" not in text
    project = tomllib.loads((settings.PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("license") == "Apache-2.0"


def test_devcontainer_has_the_form_of_its_schema_and_suits_two_cores():
    text = (settings.PROJECT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8")
    chosen = json.loads(text)
    jsonschema.validate(chosen, DEVCONTAINER)
    assert chosen["hostRequirements"]["cpus"] == 2
    target = re.fullmatch(r"make (\w+)", chosen["postCreateCommand"])[1]
    assert re.search(rf"^{target}:", (settings.PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    python = re.search(r":(?:\d+-)?(3\.\d+)", chosen["image"])[1]
    assert f"python={python}" in (settings.PROJECT / "environment.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *LESSONS], ids=by_name)
def test_page_uses_the_words_of_the_field(page):
    text = prose(markdown_of(page))
    for word, pattern in RETIRED.items():
        found = re.search(rf".*{pattern}.*", text, re.IGNORECASE)
        assert not found, f"{by_name(page)} has a retired word ({word}): {found[0]}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_page_links_to_what_exists(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#%~-]*)?", link), link
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{by_name(page)} links to {link}"
        assert not anchor or anchor in anchors(markdown_of(path)), f"{by_name(page)} links to {link}"


@pytest.mark.parametrize("lesson", LESSONS, ids=by_name)
def test_lesson_ends_with_links_to_the_documentation(lesson):
    links = read_more(lesson)
    assert 3 <= len(links) <= 5, f"{lesson.name} has {len(links)} links below **Read more:** and needs three to five"
    assert len(set(links)) == len(links), f"{lesson.name} has a link twice"
    for link in links:
        assert link.startswith(DOCUMENTATION), f"{lesson.name}: {link} is not documentation of Ray or PyTorch"
        assert re.fullmatch(r"https://[\w.-]+(/[\w.#-]+)+/?", link), f"{lesson.name}: {link} is no complete address"
