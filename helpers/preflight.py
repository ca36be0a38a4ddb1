"""Is this machine ready for the series? Answered in seconds, with a remedy for each check that fails."""

import importlib.metadata
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
import torch

from helpers import cluster, settings

GIB = 1024**3
PINNED = ("ray", "torch", "torchvision")


@dataclass(frozen=True)
class Check:
    """One line of the preflight: `state` is `ok`, `note` (the lessons run all the same) or `fail`."""

    name: str
    state: str
    found: str
    remedy: str = ""


class Report(list):
    """The checks in order; shows itself as a table."""

    @property
    def failed(self) -> list[Check]:
        """The checks that must be mended before going on."""
        return [check for check in self if check.state == "fail"]

    def __repr__(self):
        marks = {"ok": "✓", "note": "•", "fail": "✗"}
        width = max(len(check.name) for check in self)
        lines = []
        for check in self:
            lines.append(f"{marks[check.state]} {check.name:<{width}}  {check.found}")
            if check.remedy:
                lines.append(f"  {'':<{width}}  → {check.remedy}")
        return "\n".join(lines)


def run() -> Report:
    """Check this machine and the Ray that is running; call `cluster.connect()` first."""
    chosen = settings.load()
    return Report(
        [
            python_version(),
            *(package_version(name) for name in PINNED),
            cores(),
            memory(),
            shared_memory(),
            storage(chosen),
            gpus(),
            helpers_on_a_worker(),
            Check("data", "ok", f"{chosen.data_name}, kept in {chosen.path('data')}"),
        ]
    )


def python_version() -> Check:
    """Python 3.11 to 3.13."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        return Check("Python", "ok", found)
    return Check(
        "Python",
        "fail",
        found,
        "Install Python 3.11, 3.12 or 3.13 and run `make lab` with PYTHON=python3.11.",
    )


def package_version(name: str) -> Check:
    """The installed version against the tested one in constraints.txt."""
    found = importlib.metadata.version(name)
    pins = Path(settings.PROJECT, "constraints.txt")
    match = re.search(rf"^{name}==(\S+)", pins.read_text(), re.MULTILINE) if pins.exists() else None
    if match is None or found.split("+")[0] == match[1]:
        return Check(name, "ok", found)
    return Check(
        name,
        "note",
        found,
        f"The series was tested with {match[1]}: `pip install -e . -c constraints.txt`.",
    )


def cores() -> Check:
    """Processor cores, and what Ray counts."""
    total = ray.cluster_resources().get("CPU", 0)
    found = f"{cluster.cores()} on this machine, {total:g} logical CPUs in Ray"
    if cluster.cores() >= 2:
        return Check("cores", "ok", found)
    return Check("cores", "note", found, "The lessons run on one core, at half the speed they state.")


def memory(needed: float = 3 * GIB) -> Check:
    """Memory that programs can still have."""
    free = psutil.virtual_memory().available
    found = f"{free / GIB:.1f} GiB available"
    if free >= needed:
        return Check("memory", "ok", found)
    return Check("memory", "fail", found, f"Close programs until {needed / GIB:g} GiB are available.")


def shared_memory(needed: float = GIB / 2) -> Check:
    """Room in /dev/shm, where Ray keeps data between processes on Linux."""
    if not Path("/dev/shm").exists():
        return Check("shared memory", "ok", "this system has no /dev/shm and needs none")
    free = shutil.disk_usage("/dev/shm").free
    found = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free >= needed:
        return Check("shared memory", "ok", found)
    return Check(
        "shared memory",
        "fail",
        found,
        "In a container, start it with --shm-size=2g; Ray would use the disk.",
    )


def storage(chosen: settings.Settings, needed: float = 2 * GIB) -> Check:
    """Whether the storage location can be written and has room."""
    if "://" in chosen.storage:
        return Check("storage", "ok", chosen.storage)
    try:
        settings.require_writable(chosen)
    except settings.SettingError as error:
        return Check("storage", "fail", str(error), "Until then nothing can be prepared or trained.")
    free = shutil.disk_usage(chosen.storage).free
    found = f"{free / GIB:.0f} GiB free for {chosen.storage}"
    if free >= needed:
        return Check("storage", "ok", found)
    return Check(
        "storage",
        "fail",
        found,
        f"Free {needed / GIB:g} GiB, or set TUTORIAL_STORAGE to a larger disk.",
    )


def gpus() -> Check:
    """GPUs that Ray offers; the lessons run without any."""
    count = ray.cluster_resources().get("GPU", 0)
    if not count:
        return Check("GPUs", "ok", "none: the lessons train on the processor")
    if torch.cuda.is_available() or not cluster.on_one_machine():
        return Check("GPUs", "ok", f"{count:g} in Ray")
    remedy = "Update the NVIDIA driver, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the processor."
    return Check("GPUs", "fail", f"{count:g} in Ray, but PyTorch can't use them", remedy)


def helpers_on_a_worker(seconds: float = 60) -> Check:
    """Whether a Ray worker process can import `helpers`, as each training worker must."""

    @ray.remote(num_cpus=0)
    def import_helpers():
        import helpers

        return helpers.__file__

    remedy = "Start JupyterLab with `make lab`, or install the series where Ray runs: `pip install -e .`."
    try:
        found = ray.get(import_helpers.remote(), timeout=seconds)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        return Check("helpers on a worker", "fail", reason, remedy)
    return Check("helpers on a worker", "ok", f"imported from {Path(found).parent.name}/")
