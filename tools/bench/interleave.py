"""Two programs that take turns: each runs for a few seconds while the other one is stopped.

A machine that is shared with others can be a quarter faster in one minute than in the next. With turns, both programs
get the fast and the slow minutes alike, so their ratio does not depend on the machine's load.
"""

import contextlib
import signal
import subprocess
import time

import numpy as np
import psutil

SECONDS = 3  # of a turn: long compared with the milliseconds of a change, short compared with Ray's timeouts


class Clock:
    """Knows when a program ran, and counts only those seconds."""

    def __init__(self):
        self.turns = []

    def at(self, moment: float) -> float:
        """How many seconds the program had run at `moment`, a `time.time()`."""
        return sum(max(0.0, min(end, moment) - begin) for begin, end in self.turns)

    def seconds_per_step(self, steps: list[float], begin: float, end: float) -> float:
        """What a step cost the program between `begin` and `end`; `steps` are the moments at which a step ended.

        Raises:
            ValueError: less than one step lies between them.
        """
        ends = [self.at(step) for step in steps]
        begin, end = max(self.at(begin), ends[0]), min(self.at(end), ends[-1])
        first, last = np.interp([begin, end], ends, range(len(ends)))
        if last - first < 1:
            raise ValueError("the program was too short to compare, less than one step: take more --images")
        return float((end - begin) / (last - first))


def run(endless: subprocess.Popen, program: subprocess.Popen) -> tuple[Clock, Clock]:
    """Let both run in turns until `program` ends, then terminate `endless`, which prints its figures.

    Everything else that this process has started, such as a Ray, runs in the turns of `program`.

    Returns:
        The clocks of `endless` and of `program`.

    Raises:
        ChildProcessError: `endless` ended by itself; `program` was killed.
    """
    clocks = {endless: Clock(), program: Clock()}
    try:
        _stop(lambda: _all_but(endless))
        while program.poll() is None and endless.poll() is None:
            _turn(endless, clocks[endless], lambda: _tree(endless))
            _turn(program, clocks[program], lambda: _all_but(endless))
        if program.poll() is None:
            raise ChildProcessError(f"{endless.args} ended first")
    finally:
        _send(signal.SIGCONT, psutil.Process().children(recursive=True))
        endless.terminate()
        if program.poll() is None:
            program.kill()
    return clocks[endless], clocks[program]


def _turn(program: subprocess.Popen, clock: Clock, processes) -> None:
    if program.poll() is not None:
        return
    begin = time.time()
    _send(signal.SIGCONT, processes())
    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(SECONDS)
    _stop(processes)
    clock.turns.append((begin, time.time()))


def _stop(processes) -> None:
    """Stop what `processes` lists, and what those start until they are stopped."""
    stopped = set()
    while started := [process for process in processes() if process not in stopped]:
        _send(signal.SIGSTOP, started)
        stopped.update(started)


def _tree(program: subprocess.Popen) -> list[psutil.Process]:
    try:
        root = psutil.Process(program.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _all_but(program: subprocess.Popen) -> list[psutil.Process]:
    tree = set(_tree(program))
    return [process for process in psutil.Process().children(recursive=True) if process not in tree]


def _send(number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
