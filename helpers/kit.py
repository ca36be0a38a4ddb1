"""A kit: a folder from which laptops without network are set up: `python -m helpers.kit`, or `make kit`."""

import argparse
import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote

from helpers import settings, sources

SERIES = "distributed-training-with-ray"
ARCHIVE = "cifar-10-python.tar.gz"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ("3.11", "3.12", "3.13")
# What Python calls them, what uv does, and a reader. PyTorch's wheels ask for glibc 2.28 and macOS 14.
PLATFORMS = {
    "linux-x86_64": ("x86_64-manylinux_2_28", "Linux, or Windows with WSL 2, on an Intel or AMD processor"),
    "linux-aarch64": ("aarch64-manylinux_2_28", "Linux, or Windows with WSL 2, on an Arm processor"),
    "darwin-arm64": ("aarch64-apple-darwin", "macOS 14 or newer on an Apple processor"),
}


class KitError(RuntimeError):
    """A kit can't be made; the message says why and what to do."""


def here() -> str:
    """The kind of laptop that this machine is, such as `linux-x86_64-3.11`. The Makefile asks the same of a laptop."""
    return f"{platform.system()}-{platform.machine()}-{platform.python_version()}".lower().rpartition(".")[0]


def build(folder: Path, laptops: list[str], torch: str = "") -> None:
    """Write a kit for `laptops` to `folder`: the series, wheels, pictures if there are any, and START.md.

    It is written beside, as `folder`.unfinished, and renamed when it is whole. Wheels that an interrupted build
    downloaded, or that are in the kit which this one replaces, are used again.

    Args:
        folder: where to; nothing, or a kit.
        laptops: names like that of `here`.
        torch: `cpu` for PyTorch's build without the CUDA libraries, on Linux.

    Raises:
        KitError: a name is unknown; `folder` is no kit; the network, a wheel, disk or git is missing.
        DataError: the CIFAR-10 archive is not whole.
    """
    for laptop in laptops:
        name, _, python = laptop.rpartition("-")
        if name not in PLATFORMS or python not in PYTHONS:
            raise KitError(
                f"There is no kind of laptop {laptop!r}: join one of {', '.join(PLATFORMS)} and one of "
                f"{', '.join(PYTHONS)}, as in darwin-arm64-3.12 for a Mac; Windows is Linux in WSL 2."
            )
    if folder.exists() and not (folder / "START.md").is_file():
        raise KitError(f"{folder} is there already and is no kit: name another one, with KIT=folder.")
    beside = folder.with_name(f"{folder.name}.unfinished")
    try:
        copy_series(beside / SERIES)
        copy_wheels({laptop: choose(laptop, torch) for laptop in laptops}, beside / "wheels", folder / "wheels")
        (beside / "START.md").write_text(start_page(laptops), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except OSError as error:
        raise KitError(
            f"The kit could not be written to {beside} ({error}); put that right and type it again."
        ) from error


def choose(laptop: str, torch: str = "") -> list[dict]:
    """Return what the series, its extras and its own installation need on `laptop`, as packages of a pylock.toml.

    pip looks at the conditions in a package's requirements (`sys_platform == "linux"`) for the machine that it runs on,
    also when it is asked for wheels of another one; uv looks at them for the laptop.

    Raises:
        KitError: the network is missing, or there is no wheel that suits the laptop.
    """
    name, _, python = laptop.rpartition("-")
    project, constraints = settings.PROJECT / "pyproject.toml", settings.PROJECT / "constraints.txt"
    also = tomllib.loads(project.read_text())["build-system"]["requires"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--format", "pylock.toml", str(project), "-"]
    command += ["--all-extras", "--constraint", str(constraints), "--only-binary", ":all:"]
    command += ["--python-platform", PLATFORMS[name][0], "--python-version", python]
    command += ["--python", sys.executable, "--no-python-downloads"]
    if torch == "cpu" and name.startswith("linux"):
        also += [f"{pin}+cpu" for pin in re.findall(r"^torch(?:vision)?==\S+", constraints.read_text(), re.MULTILINE)]
        # That index has old versions of other packages too: the best of both, as pip itself chooses.
        command += ["--index", CPU_INDEX, "--index-strategy", "unsafe-best-match"]
    variables = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, input="\n".join(also), capture_output=True, text=True, env=variables)
    if done.returncode:
        reason = " ".join(done.stderr.replace("error: ", "").replace(" cause: ", "").split())[:400]
        raise KitError(
            f"The wheels for {laptop} could not be chosen: {reason} … If it is the network, a mirror of PyPI can be "
            "named in UV_DEFAULT_INDEX; if there is no such wheel, leave this kind of laptop out."
        )
    return tomllib.loads(done.stdout)["packages"]


def copy_wheels(chosen: dict[str, list[dict]], folder: Path, before: Path) -> None:
    """Bring the wheels of all laptops into `folder`, those that suit several once, and a list for each laptop.

    Args:
        chosen: what `choose` returned for each laptop.
        folder: where to; what else is in it is removed.
        before: a folder that may have some of them, from an earlier kit.

    Raises:
        KitError: there is too little disk, or a wheel can't be downloaded.
    """
    from torch import hub  # here, so that a misspelt name is told before torch is imported

    folder.mkdir(exist_ok=True)
    wheels = {_name(wheel): wheel for packages in chosen.values() for one in packages for wheel in one["wheels"]}
    for file in folder.iterdir():
        if file.name not in wheels:
            file.unlink()
    missing = {}
    for name, wheel in wheels.items():
        if _is_whole(folder / name, wheel):
            continue
        (folder / name).unlink(missing_ok=True)
        if _is_whole(before / name, wheel):
            _link(before / name, folder / name)
        else:
            missing[name] = wheel
    needed, free = sum(wheel.get("size", 0) for wheel in missing.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise KitError(f"The kit takes {needed / 1e9:.1f} GB more, and {folder} has {free / 1e9:.1f} GB free.")
    print(f"{len(wheels)} wheels for {', '.join(chosen)}; {len(missing)} to download, {needed / 1e9:.1f} GB …")
    for name, wheel in missing.items():
        big = wheel.get("size", 0) > 100_000_000
        try:  # beside, and renamed when the checksum is right
            hub.download_url_to_file(wheel["url"], str(folder / name), wheel["hashes"]["sha256"], progress=big)
        except (OSError, HTTPException, RuntimeError) as error:
            raise KitError(
                f"{name} could not be downloaded ({error}): type the same again, and it goes on from there."
            ) from error
    for laptop, packages in chosen.items():
        (folder / f"{laptop}.txt").write_text("".join(_requirement(one) for one in packages))


def copy_series(folder: Path) -> None:
    """Copy the files that git tracks, as they were last added or committed, and the CIFAR-10 archive if it is there.

    Raises:
        KitError: the series is no git checkout, or git is not installed.
    """
    # Without looking for .git here, git would find a clone that the series lies in, and copy that one's files.
    if not shutil.which("git") or not (settings.PROJECT / ".git").exists():
        raise KitError("A kit holds the files that git tracks: make it with git, in a clone of the series.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _git("checkout-index", "--all", f"--prefix={folder.absolute()}/")
    if changed := _git("diff", "--name-only"):
        print(f"Not in the kit, because git does not have them yet: your changes to {', '.join(changed.split())}.")
    asked = settings.load()
    archive = Path(asked.cifar10_archive or settings.DEFAULT_STORAGE / "data" / ARCHIVE)
    if archive.is_file():
        (folder / "storage" / "data").mkdir(parents=True)
        whole = sources.cifar10_archive(replace(asked, cifar10_archive=str(archive)))
        shutil.copyfile(whole, folder / "storage" / "data" / ARCHIVE)


def start_page(laptops: list[str]) -> str:
    """What a participant has to do, for `START.md`."""
    page = f"""# Start here, without network

Copy this whole folder to your laptop, open a terminal in it, and type the lines below that are for your laptop. They
make `.venv` from the folder `wheels`, which takes some minutes, and open lesson 00. There, *Run → Run All Cells*. Ticks
everywhere? You are ready.

The next time, `cd {SERIES}` and the last line are enough.
"""
    for laptop in laptops:
        name, _, python = laptop.rpartition("-")
        page += f"""
## {PLATFORMS[name][1]}, Python {python}

```
cd {SERIES}
make lab PYTHON=python{python}
```

Without `make`:

```
cd {SERIES}
python{python} -m venv .venv
.venv/bin/python -m pip install --no-index --find-links ../wheels --require-hashes -r ../wheels/{laptop}.txt
.venv/bin/python -m pip install --no-index --no-deps --no-build-isolation -e .
.venv/bin/python -m helpers.series lab
```
"""
    return page


def main() -> None:
    """Read the options and build the kit."""
    parser = argparse.ArgumentParser(prog="make kit", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the kit")
    parser.add_argument("--for", dest="laptops", nargs="+", default=[here()], help="such as linux-x86_64-3.11")
    parser.add_argument("--torch", default="", choices=["", "cpu"], help="cpu: PyTorch without CUDA, on Linux")
    options = parser.parse_args()
    socket.setdefaulttimeout(60)  # a dead line is an error, not silence
    try:
        build(options.folder.expanduser().absolute(), options.laptops, options.torch)
    except (KitError, ValueError) as error:  # ValueError: a setting, or the archive
        raise SystemExit(str(error)) from None
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    print(f"The kit is in {options.folder}: {size / 1e9:.1f} GB. Its START.md says what each participant types.")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(settings.PROJECT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise KitError(f"git could not copy the series: {' '.join(done.stderr.split())[:400]}")
    return done.stdout


def _name(wheel: dict) -> str:
    return unquote(wheel["url"].rpartition("/")[2])


def _requirement(package: dict) -> str:
    hashes = [f"--hash=sha256:{wheel['hashes']['sha256']}" for wheel in package["wheels"]]
    return " ".join([f"{package['name']}=={package['version']}", *hashes]) + "\n"


def _is_whole(file: Path, wheel: dict) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == wheel["hashes"]["sha256"]


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a stick's file system may have no links
        shutil.copyfile(old, new)


if __name__ == "__main__":
    main()
