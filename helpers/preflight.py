"""Is this machine ready for the series? Answered in seconds, with a remedy for each check that fails."""

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import ray
import torch

from helpers import cluster, settings


class Check(NamedTuple):
    """One line of the preflight: what was found and, where that is not enough, a remedy."""

    name: str
    found: str
    remedy: str = ""
    is_required: bool = True  # if not, the lessons run all the same

    def __str__(self):
        mark = "✓" if not self.remedy else "✗" if self.is_required else "•"
        return f"{mark} {self.name:<19}  {self.found}" + (f"\n{'':<21}  → {self.remedy}" if self.remedy else "")


class Report(list):
    """The checks in order; shows itself as a table."""

    @property
    def failed(self) -> list[Check]:
        """The checks that must be fixed before going on."""
        return [check for check in self if check.remedy and check.is_required]

    def __repr__(self):
        return "\n".join(map(str, self))


def run() -> Report:
    """Check this machine and the Ray that is running; call `cluster.connect()` first."""
    cfg = settings.load()
    installed = [Check("Python", sys.version.split()[0]), *map(package, ("ray", "torch", "torchvision"))]
    machine = [cores(), memory(), shared_memory(), storage(cfg), gpus(), helpers_on_a_worker()]
    found = Check("data", settings.hide_secret(f"{cfg.data_name}, in {cfg.path('data')}"))
    return Report([*installed, *machine, found])


def package(name: str) -> Check:
    """The installed version, compared with the tested one in constraints.txt."""
    found, pins = importlib.metadata.version(name), Path(settings.PROJECT, "constraints.txt")
    tested = re.search(rf"^{name}==(\S+)", pins.read_text(), re.MULTILINE)[1] if pins.exists() else found
    remedy = f"The series was tested with {tested}: `pip install -e . -c constraints.txt`."
    return Check(name, found, "" if found.partition("+")[0] == tested else remedy, is_required=False)


def cores() -> Check:
    """CPU cores, and the logical CPUs that Ray counts."""
    found = f"{cluster.cores()} here; Ray schedules with {ray.cluster_resources().get('CPU', 0):g} logical CPUs"
    return Check("CPU cores", found, "" if cluster.cores() >= 2 else "With one, lessons take twice as long.", False)


def memory(needed: float = 3) -> Check:
    """Memory that programs can still have, in GiB."""
    free = psutil.virtual_memory().available / 2**30
    remedy = "" if free >= needed else f"Close programs until {needed:g} GiB are available."
    return Check("memory", f"{free:.1f} GiB available", remedy)


def shared_memory(needed: float = 0.5) -> Check:
    """Space in /dev/shm, where Ray keeps data between processes on Linux, in GiB."""
    if not Path("/dev/shm").exists():
        return Check("shared memory", "this system has no /dev/shm and needs none")
    free = shutil.disk_usage("/dev/shm").free / 2**30
    remedy = "" if free >= needed else "In a container, start it with --shm-size=2g; Ray would use the disk."
    return Check("shared memory", f"{free:.1f} GiB free in /dev/shm", remedy)


def storage(cfg: settings.Settings, needed: float = 2) -> Check:
    """Whether the storage location can be written and has space, in GiB."""
    try:
        settings.require_writable(cfg)
        cluster.require_shared_storage(cfg.storage)
    except (settings.SettingError, cluster.ClusterError) as error:
        return Check("storage", str(error), "Until then, nothing can be prepared or trained.")
    if "://" in cfg.storage:
        return Check("storage", settings.hide_secret(cfg.storage))
    free = shutil.disk_usage(cfg.storage).free / 2**30
    remedy = "" if free >= needed else f"Free {needed:g} GiB, or set TUTORIAL_STORAGE to a larger disk."
    return Check("storage", f"{free:.0f} GiB free in {cfg.storage}", remedy)


def gpus() -> Check:
    """GPUs that Ray offers; the lessons run without any."""
    count = ray.cluster_resources().get("GPU", 0)
    if not count or torch.cuda.is_available() or not cluster.on_one_machine():
        return Check("GPUs", f"{count:g} in Ray" if count else "none: the lessons train on the CPU")
    remedy = "Update the NVIDIA driver, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU."
    return Check("GPUs", f"{count:g} in Ray, but PyTorch can't use them", remedy)


def helpers_on_a_worker(seconds: float = 60) -> Check:
    """Whether a Ray worker process can import `helpers`, as each training worker must."""
    import_helpers = ray.remote(num_cpus=0)(lambda: importlib.import_module("helpers").__name__)
    try:
        return Check("helpers on a worker", f"imports {ray.get(import_helpers.remote(), timeout=seconds)}")
    except Exception as error:
        remedy = "Start JupyterLab with `make lab`, or install the series where Ray runs: `pip install -e .`."
        return Check("helpers on a worker", str(error).strip().splitlines()[-1], remedy)
