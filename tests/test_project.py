"""The ways to install agree, the rooms import one way, and a failing lesson is reported as such."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import yaml

from helpers import series, settings

PROJECT = tomllib.loads((settings.PROJECT / "pyproject.toml").read_text())["project"]
LISTED = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (settings.PROJECT / "constraints.txt").read_text(), re.MULTILINE))


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower()


def test_conda_installs_the_same():
    environment = yaml.safe_load((settings.PROJECT / "environment.yml").read_text())
    python, pip, through_pip = environment["dependencies"]
    assert pip == "pip" and through_pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    low, high = re.findall(r"3\.\d+", PROJECT["requires-python"])
    minor = int(re.fullmatch(r"python=3\.(\d+)", python)[1])
    assert int(low[2:]) <= minor < int(high[2:])
    assert environment["name"] == PROJECT["name"]


def test_every_dependency_has_a_tested_version():
    missing = [name for name in map(name_of, LISTED) if name not in {pin.lower() for pin in PINS}]
    assert not missing


def test_installed_is_what_was_tested():
    from importlib.metadata import version

    for name in map(name_of, PROJECT["dependencies"]):
        assert version(name).split("+")[0] == PINS[name], f"{name} differs from constraints.txt"


def test_every_tested_version_takes_the_first_python_that_is_promised():
    from importlib.metadata import PackageNotFoundError, metadata

    from packaging.specifiers import SpecifierSet

    first = re.search(r"3\.\d+", PROJECT["requires-python"])[0] + ".0"
    for name, pin in PINS.items():
        try:
            about = metadata(name)
        except PackageNotFoundError:  # of another platform, or of an extra that is not installed
            continue
        if about["Version"] == pin:
            assert first in SpecifierSet(about.get("Requires-Python") or ""), f"{name}=={pin} refuses Python {first}"


def test_every_dependency_has_a_reason():
    text = (settings.PROJECT / "pyproject.toml").read_text()
    for requirement in LISTED:
        assert re.search(rf'^    "{re.escape(requirement)}",\s+# \w', text, re.MULTILINE), requirement


def test_imports_run_one_way():
    graph = {}
    for path in (settings.PROJECT / "helpers").glob("*.py"):
        graph[path.stem] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
                rooms = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                graph[path.stem] |= set(rooms)
    assert graph["settings"] == set() and graph["plots"] == set() and graph["exercises"] == set()

    def visit(room, path):
        assert room not in path, f"a circle: {' → '.join([*path, room])}"
        for target in graph[room]:
            visit(target, [*path, room])

    for room in graph:
        visit(room, [])


def test_rays_processes_do_without_what_only_the_driver_or_the_workers_need():
    """Data, controller and dataset-manager processes import these rooms; torch would cost each of them seconds."""
    rooms = "cluster, preprocessing, progress, sharding, splitting"
    code = f"import sys; from helpers import {rooms}; print({{'torch', 'grpc'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_failing_lesson_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "REPORT", tmp_path)
    (tmp_path / "executed").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('so far')\n1 / 0")])
    nbformat.write(notebook, tmp_path / "09_broken.ipynb")
    assert "ZeroDivisionError: division by zero" in series._execute(tmp_path / "09_broken.ipynb")
    assert "so far" in (tmp_path / "09_broken.html").read_text()
