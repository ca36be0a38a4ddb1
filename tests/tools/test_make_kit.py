"""A kit holds what its laptops need and nothing else, is complete or absent, and sets up a laptop without network."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import make_kit
from helpers import _sources, settings

pytestmark = pytest.mark.tools

LAPTOPS = ["linux-x86_64-3.11", "linux-x86_64-3.12", "darwin-arm64-3.12"]
MAKEFILE = settings.PROJECT / "Makefile"
PYPROJECT = """
[build-system]
requires = ["backend"]
build-backend = "backend"
[project]
name = "tiny-series"
version = "1"
requires-python = ">=3.11,<3.14"
dependencies = ["pure", "torch"]
[project.optional-dependencies]
test = ["native"]
"""
CONDITIONS = ("on-linux; sys_platform=='linux'", "on-macos; sys_platform=='darwin'", "old; python_version<'3.12'")
# Enough of a build backend for `pip install -e .`: it stands in for setuptools, which must come from the kit as well.
BACKEND = """
import zipfile
def build_editable(folder, *_):
    with zipfile.ZipFile(folder + "/tiny_series-1-py3-none-any.whl", "w") as wheel:
        info = "tiny_series-1.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: tiny-series\\nVersion: 1\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return "tiny_series-1-py3-none-any.whl"
"""


def make_wheel(index, name, version="1", tags="py3-none-any", requires=(), code=""):
    """Put a wheel into an index of the kind that pip and uv read, here as files."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    (index / name).mkdir(parents=True, exist_ok=True)
    file = index / name / f"{stem}-{tags}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name.replace('-', '_')}.py", code)
        archive.writestr(f"{stem}.dist-info/METADATA", metadata)
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    with (index / name / "index.html").open("a") as page:
        link = file.name.replace("+", "%2B")
        page.write(f'<a href="{link}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">{file.name}</a>\n')


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only index that uv and pip know."""
    folder = tmp_path / "index"
    for version in ("1", "2"):
        make_wheel(folder, "pure", version, requires=CONDITIONS)
    for name in ("on-linux", "on-macos", "old", "torch"):
        make_wheel(folder, name)
    make_wheel(folder, "backend", code=BACKEND)
    # Newer, but as source code alone: a laptop could not build it.
    (folder / "on-linux" / "on_linux-2.tar.gz").touch()
    with (folder / "on-linux" / "index.html").open("a") as page:
        page.write('<a href="on_linux-2.tar.gz">on_linux-2.tar.gz</a>\n')
    for python in ("cp311-cp311", "cp312-cp312", "cp313-cp313"):
        platforms = ("manylinux_2_17_x86_64", "manylinux_2_39_x86_64", "manylinux_2_17_aarch64", "macosx_11_0_arm64")
        for platform in platforms:
            make_wheel(folder, "native", tags=f"{python}-{platform}")
    variables = {"UV_DEFAULT_INDEX": folder.as_uri(), "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    variables |= {"PIP_INDEX_URL": folder.as_uri(), "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, index):
    """A small series in a git clone."""
    series = tmp_path / "series"
    for folder, file in (("storage", "weights.pt"), ("report", "index.html")):
        (series / folder).mkdir(parents=True)
        (series / folder / file).touch()
    shutil.copy(MAKEFILE, series)
    (series / ".gitignore").write_text("/storage/\n/report/\n")
    (series / "pyproject.toml").write_text(PYPROJECT)
    (series / "constraints.txt").write_text("pure==1\ntorch==1  # with a comment\n")
    (series / "lesson.ipynb").write_text("as committed")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=series, check=True)
    (series / "lesson.ipynb").write_text("with outputs")
    monkeypatch.setattr(settings, "PROJECT", series)
    monkeypatch.setattr(settings, "DEFAULT_STORAGE", series / "storage")
    monkeypatch.setattr(settings, "SAVED_CHOICES", series / "storage" / "settings.json")
    return series


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def requirements(kit):
    """What the lists in a kit require, by laptop."""
    return {file.stem: set(re.findall(r"^\S+==\S+", file.read_text(), re.M)) for file in (kit / "wheels").glob("*.txt")}


def test_build_gives_each_laptop_its_wheels(project, tmp_path):
    make_kit.build(tmp_path / "kit", LAPTOPS)
    common = {"backend==1", "pure==1", "torch==1", "native==1"}
    assert requirements(tmp_path / "kit") == {
        "linux-x86_64-3.11": common | {"on-linux==1", "old==1"},
        "linux-x86_64-3.12": common | {"on-linux==1"},
        "darwin-arm64-3.12": common | {"on-macos==1"},
    }
    files = [name for name in names(tmp_path / "kit" / "wheels") if name.endswith(".whl")]
    assert [name for name in files if name.startswith("native")] == [
        "native-1-cp311-cp311-manylinux_2_17_x86_64.whl",
        "native-1-cp312-cp312-macosx_11_0_arm64.whl",
        "native-1-cp312-cp312-manylinux_2_17_x86_64.whl",
    ]
    assert len(files) == 3 + 3 + 3, "each wheel is there once"


def test_build_copies_what_git_tracks(project, tmp_path, capsys):
    make_kit.build(tmp_path / "kit", LAPTOPS[:1])
    assert names(tmp_path / "kit") == ["START.md", "tiny-series", "wheels"]
    tracked = subprocess.run(["git", "ls-files"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert names(tmp_path / "kit" / "tiny-series") == sorted(tracked.split())
    assert (tmp_path / "kit" / "tiny-series" / "lesson.ipynb").read_text() == "as committed"
    assert "your changes to lesson.ipynb" in capsys.readouterr().out


def test_copy_series_brings_the_cifar10_archive(project, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setenv("TUTORIAL_STORAGE", "s3://elsewhere")
    archive = project / "storage" / "data" / make_kit.ARCHIVE
    archive.parent.mkdir()
    archive.write_text("images")
    with pytest.raises(_sources.DataError, match=make_kit.ARCHIVE):
        make_kit.copy_series(tmp_path / "damaged")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    make_kit.copy_series(tmp_path / "copy")
    assert (tmp_path / "copy" / "storage" / "data" / make_kit.ARCHIVE).read_text() == "images"


def test_build_leaves_no_kit_when_a_wheel_is_damaged(project, tmp_path, index):
    wheel = index / "old" / "old-1-py3-none-any.whl"
    complete = wheel.read_bytes()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.py", "")  # a wheel still, but not the one that the index promises
    with pytest.raises(make_kit.KitError, match=r"The wheels for linux-x86_64-3\.11 can't be downloaded"):
        make_kit.build(tmp_path / "kit", LAPTOPS[:1])
    assert not (tmp_path / "kit").exists()
    wheel.write_bytes(complete)
    make_kit.build(tmp_path / "kit", LAPTOPS[:1])
    assert (tmp_path / "kit" / "wheels" / wheel.name).read_bytes() == complete
    assert not (tmp_path / "kit.unfinished").exists()


def test_build_replaces_a_kit_only_by_a_complete_one(project, tmp_path, index):
    make_kit.build(tmp_path / "kit", LAPTOPS[1:2])
    before = names(tmp_path / "kit" / "wheels")
    make_wheel(index, "backend", "2", tags="cp312-cp312-win_amd64")
    (project / "constraints.txt").write_text("pure==1\ntorch==1\nbackend==2\n")
    with pytest.raises(make_kit.KitError, match=r"The wheels for linux-x86_64-3\.12 can't be chosen"):
        make_kit.build(tmp_path / "kit", LAPTOPS[1:2])
    assert names(tmp_path / "kit" / "wheels") == before

    (project / "constraints.txt").write_text("pure==1\ntorch==1\n")
    make_kit.build(tmp_path / "kit", LAPTOPS[2:])
    assert list(requirements(tmp_path / "kit")) == LAPTOPS[2:]
    assert not list((tmp_path / "kit" / "wheels").glob("*linux*"))


def test_build_refuses_a_folder_that_is_not_a_kit(project, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(make_kit.KitError, match="photos exists and is not a kit: name another folder"):
        make_kit.build(tmp_path / "photos", LAPTOPS)
    assert names(tmp_path / "photos") == ["cat.jpg"]


def test_choose_wheels_says_that_the_network_is_missing(project, monkeypatch, capfd):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(make_kit.KitError, match="can't be chosen: .* If it is the network, name a mirror"):
        make_kit.choose_wheels(LAPTOPS[0])
    assert "127.0.0.1:9" in capfd.readouterr().err


def test_copy_series_needs_git(project, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "")
        with pytest.raises(make_kit.KitError, match="make it with git, in a clone"):
            make_kit.copy_series(tmp_path / "copy")
    shutil.rmtree(project / ".git")
    with pytest.raises(make_kit.KitError, match="make it with git, in a clone"):
        make_kit.copy_series(tmp_path / "copy")


def test_build_says_that_the_disk_is_full(project, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_kit, "copy_series", full)
    with pytest.raises(make_kit.KitError, match=r"can't be written to .*kit\.unfinished.*No space left on device"):
        make_kit.build(tmp_path / "kit", LAPTOPS[:1])
    assert not (tmp_path / "kit").exists()


def test_build_takes_pytorch_without_cuda_for_linux_alone(project, tmp_path, monkeypatch):
    make_wheel(tmp_path / "cpu", "torch", "1+cpu")
    make_wheel(tmp_path / "cpu", "pure", "0.9")  # PyTorch's index has old versions of other packages
    monkeypatch.setattr(make_kit, "CPU_INDEX", (tmp_path / "cpu").as_uri())
    make_kit.build(tmp_path / "kit", LAPTOPS[1:], torch="cpu")
    required = requirements(tmp_path / "kit")
    assert {"torch==1+cpu", "pure==1"} <= required["linux-x86_64-3.12"]
    assert {"torch==1", "pure==1"} <= required["darwin-arm64-3.12"]
    assert {"torch-1+cpu-py3-none-any.whl", "torch-1-py3-none-any.whl"} <= {*names(tmp_path / "kit" / "wheels")}


@pytest.mark.parametrize("name", ["windows-amd64-3.12", "linux-x86_64-3.10", "linux", "darwin-x86_64-3.12"])
def test_build_refuses_an_unknown_kind_of_laptop(project, tmp_path, name):
    with pytest.raises(make_kit.KitError, match=f"no kind of laptop '{name}', only .*linux-aarch64-3.13"):
        make_kit.build(tmp_path / "kit", [LAPTOPS[0], name])
    assert not (tmp_path / "kit.unfinished").exists()


def offline(command, folder):
    """Run a command as on a laptop without network: no index answers."""
    inherited = ("MAKEFLAGS", "WHEELS", "TORCH")  # what the `make test` that runs this was told
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"  # has python3.11
    environment |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def make(folder, *words):
    return offline(["make", "setup", f"PYTHON={sys.executable}", *words], folder)


def installed(series):
    command = [str(series / ".venv" / "bin" / "python"), "-m", "pip", "list", "--format=freeze"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_kit_sets_up_a_laptop_without_network(project, tmp_path):
    make_kit.build(tmp_path / "kit", [make_kit.this_laptop()])
    series, wheel = tmp_path / "kit" / "tiny-series", tmp_path / "kit" / "wheels" / "pure-1-py3-none-any.whl"
    complete = wheel.read_bytes()
    wheel.write_bytes(b"PK, and the rest was lost")
    done = make(series)
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr and "pure==1" in done.stderr
    assert not (series / ".venv" / ".complete").exists()

    wheel.write_bytes(complete)
    done = make(series)
    assert done.returncode == 0, done.stderr
    assert "Setting up .venv from ../wheels, without network." in done.stdout
    assert {"pure==1", "torch==1", "native==1", "tiny-series==1"} <= installed(series)

    shutil.rmtree(series / ".venv")
    without_make = (tmp_path / "kit" / "START.md").read_text().split("Without `make`:")[1].split("```")[1]
    *lines, last = without_make.strip().splitlines()
    assert last == ".venv/bin/python tools/run_lessons.py lab"
    done = offline(["sh", "-e", "-c", "\n".join(lines)], tmp_path / "kit")
    assert done.returncode == 0, done.stderr
    assert {"pure==1", "torch==1", "native==1", "tiny-series==1"} <= installed(series)


def test_setup_refuses_wheels_of_another_laptop(project, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "linux-x86_64-3.10.txt").touch()
    done = make(project, f"WHEELS={tmp_path / 'wheels'}")
    assert done.returncode and not (project / ".venv").exists()
    assert re.search(rf"wheels has no wheels for {make_kit.this_laptop()}, only for:.* linux-x86_64-3\.10", done.stdout)
    assert "PYTHON=python3." in done.stdout


def test_setup_uses_the_network_outside_of_a_kit(project, tmp_path):
    assert "--no-index" not in make(project, "--dry-run").stdout
    (tmp_path / "wheels").mkdir()
    (tmp_path / "START.md").touch()
    assert "--find-links '../wheels'" in make(project, "--dry-run").stdout
    assert "--no-index" not in make(project, "--dry-run", "WHEELS=").stdout
