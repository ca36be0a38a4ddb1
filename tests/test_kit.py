"""A kit holds what its laptops need and nothing else, is whole or not there, and sets up a laptop without network."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from torch import hub

from helpers import kit, settings, sources

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
site = ["builder"]
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
    folder = tmp_path / "index"
    for version in ("1", "2"):
        make_wheel(folder, "pure", version, requires=CONDITIONS)
    for name in ("on-linux", "on-macos", "old", "torch", "builder"):
        make_wheel(folder, name)
    make_wheel(folder, "backend", code=BACKEND)
    # Newer, but as source code alone: a laptop could not build it.
    (folder / "on-linux" / "on_linux-2.tar.gz").touch()
    with (folder / "on-linux" / "index.html").open("a") as page:
        page.write('<a href="on_linux-2.tar.gz">on_linux-2.tar.gz</a>\n')
    for python in ("cp311-cp311", "cp312-cp312", "cp313-cp313"):
        for platform in (
            "manylinux_2_17_x86_64",
            "manylinux_2_39_x86_64",
            "manylinux_2_17_aarch64",
            "macosx_11_0_arm64",
        ):
            make_wheel(folder, "native", tags=f"{python}-{platform}")
    monkeypatch.setenv("UV_DEFAULT_INDEX", folder.as_uri())
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, index):
    """A small series in a git checkout."""
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
    monkeypatch.setattr(kit, "SERIES", "tiny-series")
    return series


@pytest.fixture
def made(project, tmp_path):
    kit.build(tmp_path / "kit", LAPTOPS)
    return tmp_path / "kit"


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def lists(folder):
    """What the lists of a kit's wheels name, with the hashes, by laptop."""
    return {file.stem: dict(re.findall(r"^(\S+==\S+) (.+)$", file.read_text(), re.M)) for file in folder.glob("*.txt")}


def test_each_kind_of_laptop_gets_its_own_wheels(made):
    common = {"backend==1", "builder==1", "pure==1", "torch==1", "native==1"}
    listed = lists(made / "wheels")
    assert {laptop: set(wheels) for laptop, wheels in listed.items()} == {
        "linux-x86_64-3.11": common | {"on-linux==1", "old==1"},
        "linux-x86_64-3.12": common | {"on-linux==1"},
        "darwin-arm64-3.12": common | {"on-macos==1"},
    }
    files = {file.name for file in (made / "wheels").glob("*.whl")}
    assert {name for name in files if name.startswith("native")} == {
        "native-1-cp311-cp311-manylinux_2_17_x86_64.whl",
        "native-1-cp312-cp312-manylinux_2_17_x86_64.whl",
        "native-1-cp312-cp312-macosx_11_0_arm64.whl",
    }
    assert len(files) == 3 + 4 + 3, "each wheel is there once"
    hashes = " ".join(hash for wheels in listed.values() for hash in wheels.values())
    for name in files:
        assert hashlib.sha256((made / "wheels" / name).read_bytes()).hexdigest() in hashes


def test_a_kit_holds_the_series_as_git_has_it(project, tmp_path, capsys):
    kit.build(tmp_path / "kit", LAPTOPS[:1])
    assert names(tmp_path / "kit") == ["START.md", "tiny-series", "wheels"]
    tracked = subprocess.run(["git", "ls-files"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert names(tmp_path / "kit" / "tiny-series") == sorted(tracked.split())
    assert (tmp_path / "kit" / "tiny-series" / "lesson.ipynb").read_text() == "as committed"
    assert "your changes to lesson.ipynb" in capsys.readouterr().out


def test_a_downloaded_archive_comes_along(project, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    (project / "storage" / "data").mkdir()
    (project / "storage" / "data" / CIFAR10.filename).write_text("pictures")
    monkeypatch.setenv("TUTORIAL_STORAGE", "s3://elsewhere")
    with pytest.raises(sources.DataError, match="is not the whole CIFAR-10 archive"):
        kit.copy_series(tmp_path / "copy")
    monkeypatch.setattr(sources, "_md5", lambda file: CIFAR10.tgz_md5)
    kit.copy_series(tmp_path / "copy")
    assert (tmp_path / "copy" / "storage" / "data" / CIFAR10.filename).read_text() == "pictures"


def test_an_interrupted_kit_is_not_there_and_is_finished_later(project, tmp_path, monkeypatch):
    download, asked = hub.download_url_to_file, []

    def interrupted(url, *rest, **options):
        asked.append(url.rpartition("/")[2])
        if len(asked) == 4:
            raise OSError("the line is dead")
        download(url, *rest, **options)

    monkeypatch.setattr(hub, "download_url_to_file", interrupted)
    with pytest.raises(kit.KitError, match=r"whl could not be downloaded \(the line is dead\): type the same again"):
        kit.build(tmp_path / "kit", LAPTOPS)
    assert not (tmp_path / "kit").exists() and not list((tmp_path / "kit.unfinished" / "wheels").glob("*.txt"))

    (tmp_path / "kit.unfinished" / "wheels" / asked[0]).write_text("half of it")
    (tmp_path / "kit.unfinished" / "wheels" / "something.partial").touch()
    before = asked.copy()
    kit.build(tmp_path / "kit", LAPTOPS)
    again = asked[4:]
    assert before[0] in again and before[3] in again and not {before[1], before[2]} & set(again)
    assert zipfile.is_zipfile(tmp_path / "kit" / "wheels" / asked[0])
    assert not (tmp_path / "kit.unfinished").exists() and not list((tmp_path / "kit").rglob("*.partial"))


def test_a_new_kit_uses_the_wheels_of_the_old_one_and_leaves_out_what_it_does_not_need(made, monkeypatch, index):
    shutil.move(made / "wheels" / "pure-1-py3-none-any.whl", made / "pure")
    shutil.copy(index / "pure" / "pure-2-py3-none-any.whl", made / "wheels" / "pure-1-py3-none-any.whl")
    asked, download = [], hub.download_url_to_file
    monkeypatch.setattr(hub, "download_url_to_file", lambda url, *a, **o: (asked.append(url), download(url, *a, **o)))
    monkeypatch.setattr(kit.os, "link", lambda old, new: (_ for _ in ()).throw(PermissionError("no links on a stick")))
    kit.build(made, LAPTOPS[2:])
    assert [url.rpartition("/")[2] for url in asked] == ["pure-1-py3-none-any.whl"], "the one that is another"
    assert list(lists(made / "wheels")) == LAPTOPS[2:] and not list((made / "wheels").glob("*linux*"))
    assert "pure" not in names(made)


def test_a_folder_that_is_no_kit_is_left_alone(project, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(kit.KitError, match="photos is there already and is no kit: name another one"):
        kit.build(tmp_path / "photos", LAPTOPS)
    assert names(tmp_path / "photos") == ["cat.jpg"]


def test_what_no_wheel_suits_is_said_and_leaves_the_old_kit(made, project, index):
    make_wheel(index, "backend", "2", tags="cp312-cp312-win_amd64")
    (project / "constraints.txt").write_text("pure==1\ntorch==1\nbackend==2\n")
    before = lists(made / "wheels")
    with pytest.raises(kit.KitError, match=r"The wheels for linux-x86_64-3\.12 could not be chosen: .*backend"):
        kit.build(made, ["linux-x86_64-3.12"])
    assert lists(made / "wheels") == before and (made / "tiny-series").is_dir()


def test_without_network_it_says_so(project, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(kit.KitError, match="could not be chosen: .*127.0.0.1:9.* If it is the network, a mirror"):
        kit.choose(LAPTOPS[0])


def test_a_wheel_that_arrives_changed_is_not_kept(project, tmp_path, index):
    chosen = {LAPTOPS[0]: kit.choose(LAPTOPS[0])}
    (index / "old" / "old-1-py3-none-any.whl").write_text("cut short")
    with pytest.raises(kit.KitError, match=r"old-1-py3-none-any\.whl could not be downloaded \(invalid hash"):
        kit.copy_wheels(chosen, tmp_path / "wheels", tmp_path / "none")
    assert not list((tmp_path / "wheels").glob("old-*"))


def test_without_git_it_says_so(project, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "")
        with pytest.raises(kit.KitError, match="make it with git, in a clone"):
            kit.copy_series(tmp_path / "copy")
    shutil.rmtree(project / ".git")
    with pytest.raises(kit.KitError, match="make it with git, in a clone"):
        kit.copy_series(tmp_path / "copy")


def test_too_little_disk_is_said_before_the_download(project, tmp_path, monkeypatch):
    chosen = {LAPTOPS[0]: kit.choose(LAPTOPS[0])}
    for package in chosen[LAPTOPS[0]]:
        package["wheels"][0]["size"] = 10**9  # as PyPI says it, and an index of files does not
    monkeypatch.setattr(kit.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2e9))
    monkeypatch.setattr(hub, "download_url_to_file", None)
    with pytest.raises(kit.KitError, match=r"The kit takes 7\.0 GB more, and .* has 2\.0 GB free"):
        kit.copy_wheels(chosen, tmp_path / "wheels", tmp_path / "none")


def test_a_disk_that_fills_is_said_and_leaves_no_kit(project, tmp_path, monkeypatch):
    def full(laptops):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kit, "start_page", full)
    with pytest.raises(kit.KitError, match=r"could not be written to .*kit\.unfinished.*No space left on device"):
        kit.build(tmp_path / "kit", LAPTOPS[:1])
    assert not (tmp_path / "kit").exists()


def test_pytorch_without_cuda_is_for_linux_alone(project, tmp_path, monkeypatch):
    make_wheel(tmp_path / "cpu", "torch", "1+cpu")
    make_wheel(tmp_path / "cpu", "pure", "0.9")  # PyTorch's index has old versions of others' packages
    assert f"--extra-index-url {kit.CPU_INDEX}\n" in MAKEFILE.read_text(), "the Makefile names another index"
    monkeypatch.setattr(kit, "CPU_INDEX", (tmp_path / "cpu").as_uri())
    kit.build(tmp_path / "kit", ["linux-x86_64-3.12", "darwin-arm64-3.12"], torch="cpu")
    listed = lists(tmp_path / "kit" / "wheels")
    assert {"torch==1+cpu", "pure==1"} <= set(listed["linux-x86_64-3.12"])
    assert {"torch==1", "pure==1"} <= set(listed["darwin-arm64-3.12"])
    assert (tmp_path / "kit" / "wheels" / "torch-1+cpu-py3-none-any.whl").is_file()


@pytest.mark.parametrize("name", ["windows-amd64-3.12", "linux-x86_64-3.10", "linux", "darwin-x86_64-3.12"])
def test_an_unknown_kind_of_laptop_is_refused(project, tmp_path, name):
    with pytest.raises(kit.KitError, match=f"no kind of laptop '{name}'.*linux-aarch64.*as in darwin-arm64-3.12"):
        kit.build(tmp_path / "kit", [LAPTOPS[0], name])
    assert not (tmp_path / "kit.unfinished").exists()


def offline(command, folder):
    """Run a command as on a laptop without network: no index answers."""
    dead = {name: "http://127.0.0.1:9/simple" for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")}
    ours = ("MAKEFLAGS", "WHEELS", "TORCH")  # what the `make test` that runs this was told
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"  # has python3.11
    environment |= {**dead, "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def make(folder, *words, target="setup"):
    return offline(["make", target, f"PYTHON={sys.executable}", *words], folder)


def installed(series):
    command = [str(series / ".venv" / "bin" / "python"), "-m", "pip", "list", "--format=freeze"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_a_laptop_is_set_up_from_the_kit_alone(project, tmp_path):
    kit.build(tmp_path / "kit", [kit.here()])
    series, wheels = tmp_path / "kit" / "tiny-series", tmp_path / "kit" / "wheels"
    shutil.copy(wheels / "pure-1-py3-none-any.whl", tmp_path)
    (wheels / "pure-1-py3-none-any.whl").write_bytes(b"PK, and no more came through")
    done = make(series)
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr and "pure==1" in done.stderr
    assert not (series / ".venv" / ".complete").exists()

    shutil.copy(tmp_path / "pure-1-py3-none-any.whl", wheels)
    done = make(series)
    assert done.returncode == 0, done.stderr
    assert "Setting up .venv from ../wheels, without network." in done.stdout
    assert {"pure==1", "torch==1", "native==1", "tiny-series==1"} <= installed(series)

    shutil.rmtree(series / ".venv")
    without_make = (tmp_path / "kit" / "START.md").read_text().split("Without `make`:")[1].split("```")[1]
    lines = without_make.strip().splitlines()
    assert len(lines) == 5 and lines[-1] == ".venv/bin/python -m helpers.series lab"
    done = offline(["sh", "-e", "-c", "\n".join(lines[:-1])], tmp_path / "kit")
    assert done.returncode == 0, done.stderr
    assert {"pure==1", "torch==1", "native==1", "tiny-series==1"} <= installed(series)


def test_other_wheels_than_the_laptop_needs_are_refused_at_once(made, project, tmp_path):
    for file in (made / "wheels").glob(f"{kit.here()}.txt"):
        file.unlink()
    (made / "wheels" / "linux-x86_64-3.10.txt").touch()
    done = make(made / "tiny-series")
    assert done.returncode and not (made / "tiny-series" / ".venv").exists()
    assert re.search(
        rf"\.\./wheels has no wheels for {kit.here()}, which this is, only for:.* linux-x86_64-3\.10", done.stdout
    )
    assert "PYTHON=python3." in done.stdout

    done = make(project, f"WHEELS={tmp_path / 'a stick'}")
    assert done.returncode and f"{tmp_path / 'a stick'} has no wheels for {kit.here()}" in done.stdout


def test_a_series_outside_of_a_kit_uses_the_network(made, project):
    assert "--no-index" not in make(project, "--dry-run").stdout
    assert "'.[site]'" in make(project, "--dry-run", target="site").stdout
    assert "'.[site]'" not in make(made / "tiny-series", "--dry-run", target="site").stdout
    assert "--no-index" not in make(made / "tiny-series", "--dry-run", "WHEELS=").stdout
    assert "--find-links '../wheels'" in make(made / "tiny-series", "--dry-run", "TORCH=cpu").stdout


def test_the_start_page_says_for_each_laptop_what_the_makefile_does():
    page = kit.start_page(LAPTOPS)
    assert re.findall(r"^## .*Python (.*)$", page, re.M) == ["3.11", "3.12", "3.12"] and "## macOS 14" in page
    recipe = MAKEFILE.read_text()
    for laptop in LAPTOPS:
        python = laptop.rpartition("-")[2]
        assert f"make lab PYTHON=python{python}\n" in page and f"python{python} -m venv .venv\n" in page
        assert f"--no-index --find-links ../wheels --require-hashes -r ../wheels/{laptop}.txt\n" in page
    assert "--no-index --find-links '$(WHEELS)' --require-hashes -r '$(WHEELS)'/$(LAPTOP).txt" in recipe
    for options in re.findall(r"pip install (--no-index --no-deps .*)", page):
        assert f"$(INSTALL) {options}" in recipe
