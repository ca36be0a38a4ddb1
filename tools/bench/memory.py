"""How much memory a process, or Ray, takes, in megabytes."""

import contextlib
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import ray


def resident() -> float:
    """What this process holds now."""
    return psutil.Process().memory_info().rss / 1e6


def peak() -> float:
    """The most that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def spilled() -> float:
    """What Ray has written from its object store to disk since it started."""
    command = [Path(sys.executable).with_name("ray"), "memory", "--stats-only"]
    address = f"--address={ray.get_runtime_context().gcs_address}"
    printed = subprocess.run([*command, address], capture_output=True, text=True, check=True).stdout
    assert "Plasma memory usage" in printed, printed
    found = re.search(r"Spilled (\d+) MiB", printed)  # Ray says nothing if nothing was spilled
    return int(found[1]) * 2**20 / 1e6 if found else 0.0


class Watch:
    """Sample twice per second what this process, all of Ray's workers and the object store hold."""

    def __enter__(self):
        self.most, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _sample(self):
        while not self._done.wait(0.5):
            held = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    used = process.memory_info()
                    shared = getattr(used, "shared", 0)  # macOS does not tell
                    held += used.rss - shared
                    if process.name() == "raylet":  # the object store is its shared memory
                        held += shared
            self.most = max(self.most, held / 1e6)
