"""How much memory a process takes, in megabytes."""

import resource
import threading

import psutil


def resident() -> float:
    """What this process holds now."""
    return psutil.Process().memory_info().rss / 1e6


def peak() -> float:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Watch:
    """Sample twice per second what this process and all of Ray's workers hold, without shared memory."""

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
            for process in [psutil.Process(), *psutil.process_iter(["name"])]:
                try:
                    if process.pid == psutil.Process().pid or process.info["name"].startswith("ray::"):
                        used = process.memory_info()
                        held += used.rss - used.shared
                except (psutil.Error, AttributeError):
                    continue
            self.most = max(self.most, held / 1e6)
