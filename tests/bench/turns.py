"""Two programs at once that never run at the same moment: a few seconds each in turn, the other one stopped.

A machine that is shared with others can be a quarter faster in one minute than in the next. In turns both programs
get the fast and the slow minutes alike, and their ratio is theirs, not the machine's.
"""

import contextlib
import signal
import subprocess
import time

import psutil

SECONDS = 3  # a turn: long beside the milliseconds of a change, short beside Ray's patience with a silent process


class Clock:
    """Knows when a program ran, and counts only those seconds."""

    def __init__(self):
        self.turns = []

    def at(self, moment: float) -> float:
        """How many seconds the program had run at `moment`, a `time.time()`."""
        return sum(max(0.0, min(end, moment) - begin) for begin, end in self.turns)


def run(bare: subprocess.Popen, other: subprocess.Popen) -> tuple[Clock, Clock]:
    """Let both run to their ends in turns; what else this process has started, a Ray say, runs with `other`."""
    clocks = {bare: Clock(), other: Clock()}
    try:
        _stop(lambda: _others(bare))
        while any(program.poll() is None for program in clocks):
            _turn(bare, clocks[bare], lambda: _tree(bare))
            _turn(other, clocks[other], lambda: _others(bare))
    finally:
        _send(signal.SIGCONT, psutil.Process().children(recursive=True))
        for program in clocks:
            if program.poll() is None:
                program.kill()
    return clocks[bare], clocks[other]


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
    """Stop what `processes` lists, and what started meanwhile."""
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


def _others(program: subprocess.Popen) -> list[psutil.Process]:
    mine = set(_tree(program))
    return [process for process in psutil.Process().children(recursive=True) if process not in mine]


def _send(number: int, processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
