"""The agendas on the page for instructors add up, fit the lessons, and name what exists."""

import re

import nbformat
import pytest

from conftest import seconds_stated
from helpers import settings

PAGE = (settings.PROJECT / "docs" / "INSTRUCTORS.md").read_text()
LESSONS = {path.name[:2]: path for path in (settings.PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
AGENDAS = {int(minutes): text for minutes, text in re.findall(r"### (\d+) minutes(.*?)(?=\n##)", PAGE, re.DOTALL)}


def rows(minutes):
    found = re.findall(r"^\| (\d+)–(\d+) \| (.*?) \| (.*?) \|$", AGENDAS[minutes], re.MULTILINE)
    return [(int(start), int(end), what, room) for start, end, what, room in found]


def prose(number):
    """A lesson's text: its header comes first, and states its minutes."""
    cells = nbformat.read(LESSONS[number], as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_agendas_have_three_lengths_and_readme_names_them():
    assert sorted(AGENDAS) == [45, 90, 300]
    readme = (settings.PROJECT / "README.md").read_text().split()
    assert "agendas of 45, 90 and 300 minutes" in " ".join(readme)


def test_agenda_of_five_hours_has_all_lessons():
    assert sorted({what[:2] for _, _, what, room in rows(300) if room.startswith("run")}) == sorted(LESSONS)


@pytest.mark.parametrize("minutes", [45, 90, 300])
def test_agenda_minutes_add_up(minutes):
    table = rows(minutes)
    # Every line of the table is a row that was understood: two lines are the head.
    assert len(table) == len(re.findall(r"^\|", AGENDAS[minutes], re.MULTILINE)) - 2
    assert table[0][0] == 0 and table[-1][1] == minutes
    for (_, end, *_), (start, *_) in zip(table, table[1:], strict=False):
        assert start == end
    assert all(start < end for start, end, *_ in table)


@pytest.mark.parametrize("minutes", [45, 90, 300])
def test_agenda_names_lessons_and_sections_that_exist(minutes):
    for _, _, what, _ in rows(minutes):
        if what == "break":
            continue
        number, sections = re.fullmatch(r"(\d\d) · (.+)", what).groups()
        text = prose(number)
        for section in sections.split(", "):
            heading = rf"^## {section}$" if section == "Try it" else rf"^## {section} · "
            assert re.search(heading, text, re.MULTILINE), f"lesson {number} has no section {section}"


@pytest.mark.parametrize("minutes", [45, 90, 300])
def test_agenda_leaves_time_to_read_and_run(minutes):
    """Minutes to read are counted in proportion to the sections that an agenda names; a run always counts in full."""
    assert len([room for *_, room in rows(minutes) if room.startswith("run")]) >= 5
    for start, end, what, room in rows(minutes):
        if what == "break" or "Try it" in what:
            continue
        text, named = prose(what[:2]), what[5:].split(", ")
        needed = int(re.search(r"(\d+) to read", text)[1]) * len(named) / len(re.findall(r"^## \d", text, re.MULTILINE))
        if room.startswith("run"):
            needed += seconds_stated(text) / 60
        assert end - start >= needed, f"{what}: {end - start} minutes, and the lesson's header asks for {needed:.1f}"


@pytest.mark.parametrize("minutes", [45, 90, 300])
def test_agenda_names_the_lessons_it_skips(minutes):
    present = {what[:2] for _, _, what, _ in rows(minutes)}
    skipped = re.search(r"^Skip (.*?)\.", AGENDAS[minutes], re.MULTILINE)
    assert sorted(re.findall(r"\d\d", skipped[1] if skipped else "")) == sorted(set(LESSONS) - present)


def test_questions_exist_for_every_lesson():
    asked = PAGE.split("## What to ask")[1].split("\n## ")[0]
    for number, path in LESSONS.items():
        title = re.match(r"# (.*)", nbformat.read(path, as_version=4).cells[0].source)[1]
        paragraph = re.search(rf"^\*\*{re.escape(title)}\.\*\* (.*)$", asked, re.MULTILINE)
        assert paragraph, f"no questions for {title}"
        assert len(re.findall(r"\*[^*]+\?[^*]*\*", paragraph[1])) >= 2, f"{number} has too few questions"


def test_page_names_commands_and_variables_that_exist():
    makefile = (settings.PROJECT / "Makefile").read_text()
    for command in set(re.findall(r"`make ([\w-]+)|^make ([\w-]+)", PAGE, re.MULTILINE)):
        assert re.search(rf"^{''.join(command)}:", makefile, re.MULTILINE), command
    for variable in set(re.findall(r"TUTORIAL_(\w+)", PAGE)):
        assert variable.lower() in settings.Settings.__dataclass_fields__, variable


def test_page_quotes_the_program():
    code = "".join(path.read_text() for path in (settings.PROJECT / "helpers").glob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one text from strings on several lines
    for message in (
        "workers need",
        "and only ",
        "let the other lesson finish or shut down its kernel",
        "can't be shared evenly by",
        "No Ray answers at RAY_ADDRESS=",
        "is not the whole archive",
        "There is no trained checkpoint for ",
    ):
        assert message in PAGE and message in code, message
