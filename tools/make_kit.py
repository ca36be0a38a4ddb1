"""Makes a kit, a folder from which laptops are set up without network: `make kit`."""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

from helpers import _sources, settings

ARCHIVE = "cifar-10-python.tar.gz"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Name in Python, name in uv, name for people. PyTorch's wheels need glibc 2.28 and macOS 14.
PLATFORMS = {
    "linux-x86_64": ("x86_64-manylinux_2_28", "Linux, or Windows with WSL 2, on an Intel or AMD CPU"),
    "linux-aarch64": ("aarch64-manylinux_2_28", "Linux, or Windows with WSL 2, on an Arm CPU"),
    "darwin-arm64": ("aarch64-apple-darwin", "macOS 14 or newer on an Apple CPU"),
}
LAPTOPS = [f"{platform}-{python}" for platform in PLATFORMS for python in ("3.11", "3.12", "3.13")]


class KitError(RuntimeError):
    """A kit can't be made; the message says why and what to do."""


def this_laptop() -> str:
    """The kind of laptop that this machine is, such as `linux-x86_64-3.11`. The Makefile computes the same."""
    return f"{platform.system()}-{platform.machine()}-{platform.python_version()}".lower().rpartition(".")[0]


def build(folder: Path, laptops: list[str], torch: str = "") -> None:
    """Write a kit for `laptops` to `folder`: the series, its wheels, the CIFAR-10 archive if it is there, START.md.

    The kit is written to `folder`.unfinished and renamed when it is complete.

    Args:
        folder: does not exist yet, or holds a kit, which is replaced.
        laptops: kinds of laptop, as `this_laptop` names them.
        torch: `cpu` for PyTorch's build without the CUDA libraries, on Linux.

    Raises:
        KitError: a kind is unknown, `folder` is no kit, or the network, a wheel, disk space or git is missing.
        DataError: the CIFAR-10 archive is damaged.
    """
    if unknown := sorted({*laptops} - {*LAPTOPS}):
        raise KitError(f"There is no kind of laptop {unknown[0]!r}, only {', '.join(LAPTOPS)}.")
    if folder.exists() and not (folder / "START.md").is_file():
        raise KitError(f"{folder} exists and is not a kit: name another folder with KIT=folder.")
    name = tomllib.loads((settings.PROJECT / "pyproject.toml").read_text())["project"]["name"]
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "wheels").mkdir(parents=True)
        copy_series(unfinished / name)
        chosen = {laptop: choose_wheels(laptop, torch) for laptop in laptops}  # all, before the first download
        for laptop, requirements in chosen.items():
            download_wheels(laptop, requirements, unfinished / "wheels", torch)
        (unfinished / "START.md").write_text(start_page(name, laptops), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        raise KitError(f"The kit can't be written to {unfinished} ({error}): fix that and run it again.") from error


def choose_wheels(laptop: str, torch: str = "") -> str:
    """Return what the series, its extra and its own installation need on `laptop`: exact versions with hashes.

    uv evaluates conditions such as `sys_platform == "linux"` for the laptop. pip would evaluate them for this machine.

    Raises:
        KitError: the network is missing, or there is no wheel that suits the laptop.
    """
    name, _, python = laptop.rpartition("-")
    project, constraints = settings.PROJECT / "pyproject.toml", settings.PROJECT / "constraints.txt"
    more = tomllib.loads(project.read_text())["build-system"]["requires"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes", str(project), "-"]
    command += ["--no-annotate", "--no-header", "--all-extras", "--constraint", str(constraints)]
    command += ["--only-binary", ":all:", "--python-platform", PLATFORMS[name][0], "--python-version", python]
    command += ["--python", sys.executable, "--no-python-downloads"]
    if torch == "cpu" and name.startswith("linux"):
        more += [f"{pin}+cpu" for pin in re.findall(r"^torch(?:vision)?==\S+", constraints.read_text(), re.MULTILINE)]
        # That index has old versions of other packages too. Take the best of both, as pip does.
        command += ["--index", CPU_INDEX, "--index-strategy", "unsafe-best-match"]
    problem = (
        f"The wheels for {laptop} can't be chosen: uv's message above says why. If it is the network, name a mirror of "
        "PyPI in UV_DEFAULT_INDEX. If a wheel is missing, leave this kind of laptop out."
    )
    return _run(command, problem, input="\n".join(more), env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"})


def download_wheels(laptop: str, requirements: str, folder: Path, torch: str = "") -> None:
    """Write `requirements` to `folder` and their wheels next to them; pip's cache has what it downloaded before.

    Raises:
        KitError: a wheel can't be downloaded, or there is too little disk space.
    """
    name, _, python = laptop.rpartition("-")
    system, _, arch = name.partition("-")
    (folder / f"{laptop}.txt").write_text(requirements)
    platforms = ["macosx_14_0_arm64"]  # pip adds the older versions of macOS by itself, but not those of glibc
    if system == "linux":
        platforms = [f"manylinux_2_{minor}_{arch}" for minor in range(28, 4, -1)]
        platforms += [f"manylinux2014_{arch}", f"manylinux2010_{arch}", f"manylinux1_{arch}", f"linux_{arch}"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(folder / f"{laptop}.txt")]
    command += ["--python-version", python, *(f"--platform={platform}" for platform in platforms)]
    command += ["--extra-index-url", CPU_INDEX] if torch == "cpu" else []
    _run(command, f"The wheels for {laptop} can't be downloaded: pip's message above says why.", stdout=None)


def copy_series(folder: Path) -> None:
    """Copy the files that git tracks, as last added or committed, and the CIFAR-10 archive if it is there.

    Raises:
        KitError: the series is not a git clone, or git is not installed.
        DataError: the archive is damaged.
    """
    # Without .git here, git would find a repository that the series lies in, and copy that one's files.
    problem = "A kit holds the files that git tracks: make it with git, in a clone of the series."
    if not shutil.which("git") or not (settings.PROJECT / ".git").exists():
        raise KitError(problem)
    git = ["git", "-C", str(settings.PROJECT)]
    folder.mkdir(parents=True)
    _run([*git, "checkout-index", "--all", f"--prefix={folder.absolute()}/"], problem)
    if changed := _run([*git, "diff", "--name-only"], problem).split():
        print(f"Not in the kit, because git does not have them yet: your changes to {', '.join(changed)}.")
    cfg = settings.load()
    storage = settings.DEFAULT_STORAGE if "://" in cfg.storage else cfg.storage
    archive = Path(cfg.cifar10_archive or Path(storage, "data", ARCHIVE))
    if archive.is_file():
        checked = _sources.cifar10_archive(replace(cfg, cifar10_archive=str(archive)))
        (folder / "storage" / "data").mkdir(parents=True)
        shutil.copyfile(checked, folder / "storage" / "data" / ARCHIVE)


def start_page(series: str, laptops: list[str]) -> str:
    """Return what START.md tells the participants to do; `series` is the name of the series' folder in the kit."""
    page = f"""# Start here, without network

Copy this whole folder to your laptop, open a terminal in it, and type the lines below for your kind of laptop. They
create `.venv` from the folder `wheels`, which takes some minutes, and open lesson 00. There, choose *Run → Run All
Cells*. If every line has a tick mark, you are ready.

Next time, `cd {series}` and the last line are enough.
"""
    for laptop in laptops:
        name, _, python = laptop.rpartition("-")
        page += f"""
## {PLATFORMS[name][1]}, Python {python}

```
cd {series}
make lab PYTHON=python{python}
```

Without `make`:

```
cd {series}
python{python} -m venv .venv
.venv/bin/python -m pip install --no-index --find-links ../wheels --require-hashes -r ../wheels/{laptop}.txt
.venv/bin/python -m pip install --no-index --no-deps --no-build-isolation -e .
.venv/bin/python tools/run_lessons.py lab
```
"""
    return page


def _run(command: list[str], problem: str, stdout=subprocess.PIPE, **options) -> str:
    """Run a command and return what it prints; its error messages go to the terminal."""
    done = subprocess.run(command, text=True, stdout=stdout, **options)
    if done.returncode:
        raise KitError(problem)
    return done.stdout


def main() -> None:
    """Read the options and build the kit."""
    parser = argparse.ArgumentParser(prog="make kit", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the kit")
    parser.add_argument("--for", dest="laptops", nargs="+", default=[this_laptop()], help="such as linux-x86_64-3.11")
    parser.add_argument("--torch", default="", choices=["", "cpu"], help="cpu: PyTorch without CUDA, on Linux")
    options = parser.parse_args()
    folder = options.folder.expanduser().absolute()
    try:
        build(folder, options.laptops, options.torch)
    except (KitError, ValueError) as error:  # ValueError: a setting, or the archive
        raise SystemExit(str(error)) from None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"The kit is in {folder}: {size / 1e9:.1f} GB. Its START.md says what each participant types.")


if __name__ == "__main__":
    main()
