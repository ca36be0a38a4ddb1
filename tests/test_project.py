"""The ways to install agree, `helpers` keeps its house in order, and Ray's processes stay light."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml

import helpers
from helpers import settings

PROJECT = tomllib.loads((settings.PROJECT / "pyproject.toml").read_text())["project"]
LISTED = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (settings.PROJECT / "constraints.txt").read_text(), re.MULTILINE))
MODULES = {path.stem: path for path in (settings.PROJECT / "helpers").glob("*.py") if path.stem != "__init__"}
PRIVATE = r"ray\._private|ray\._common|\._internal|core\.generated|_system_config|unittest|mock"


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower()


def imported_helpers(code):
    """The modules of `helpers` that a piece of Python imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            found |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return found


def test_conda_installs_the_same():
    environment = yaml.safe_load((settings.PROJECT / "environment.yml").read_text())
    python, pip, through_pip = environment["dependencies"]
    assert pip == "pip" and through_pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    low, high = re.findall(r"3\.\d+", PROJECT["requires-python"])
    minor = int(re.fullmatch(r"python=3\.(\d+)", python)[1])
    assert int(low[2:]) <= minor < int(high[2:])
    assert environment["name"] == PROJECT["name"]


def test_dependencies_have_a_tested_version():
    missing = [name for name in map(name_of, LISTED) if name not in {pin.lower() for pin in PINS}]
    assert not missing


def test_dependencies_are_installed_as_tested():
    from importlib.metadata import version

    for name in map(name_of, PROJECT["dependencies"]):
        assert version(name).split("+")[0] == PINS[name], f"{name} differs from constraints.txt"


def test_tested_versions_take_the_first_python_that_is_promised():
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


def test_dependencies_have_a_reason():
    text = (settings.PROJECT / "pyproject.toml").read_text()
    for requirement in LISTED:
        assert re.search(rf'^    "{re.escape(requirement)}",\s+# \w', text, re.MULTILINE), requirement


def test_helpers_imports_run_one_way():
    graph = {name: imported_helpers(path.read_text()) for name, path in MODULES.items()}
    checks = (settings.PROJECT / "notebooks/exercises.py").read_text()
    assert graph["settings"] == graph["plots"] == imported_helpers(checks) == set()

    def visit(module, path):
        assert module not in path, f"a circle: {' → '.join([*path, module])}"
        for target in graph[module]:
            visit(target, [*path, module])

    for module in graph:
        visit(module, [])


def test_helpers_are_imported_by_a_lesson():
    lessons = set()
    for path in (settings.PROJECT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                lessons |= imported_helpers(cell.source)
    assert not {name for name in MODULES if not name.startswith("_")} - lessons


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"_ray_internals"}))
def test_helpers_name_nothing_undocumented_in_ray(module):
    assert not re.findall(PRIVATE, MODULES[module].read_text())


@pytest.mark.parametrize("path", sorted((settings.PROJECT / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_modules_of_lessons_name_nothing_undocumented_in_ray(path):
    assert not re.findall(PRIVATE, path.read_text())


def test_helpers_are_on_the_map():
    on_the_map = re.findall(r"^(\w+) {2,}(?:\d\d|  )", helpers.__doc__, re.MULTILINE)
    assert sorted(on_the_map) == sorted(MODULES)


def test_helpers_stay_small():
    lines = sum(
        len(path.read_text().splitlines())
        for path in [*MODULES.values(), *settings.PROJECT.glob("helpers/__init__.py")]
    )
    assert len(MODULES) <= 18 and lines <= 2500


def test_rays_processes_do_without_torch_and_grpc():
    """Data, controller and dataset-manager processes import these modules; torch would cost each of them seconds."""
    modules = "cluster, preprocessing, progress, data_config, data"
    code = f"import sys; from helpers import {modules}; print({{'torch', 'grpc'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
