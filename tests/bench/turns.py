"""Two programs at once that never run at the same moment: a few seconds each in turn, the other one stopped.

A machine that is shared with others can be a quarter faster in one minute than in the next. In turns both programs
get the fast and the slow minutes alike, and their ratio is theirs, not the machine's.
"""

import contextlib
import signal
import subprocess
import time

import numpy as np
import psutil

SECONDS = 3  # a turn: long beside the milliseconds of a change, short beside Ray's patience with a silent process


class Clock:
    """Knows when a program ran, and counts only those seconds."""

    def __init__(self):
        self.turns = []

    def at(self, moment: float) -> float:
        """How many seconds the program had run at `moment`, a `time.time()`."""
        return sum(max(0.0, min(end, moment) - begin) for begin, end in self.turns)

    def seconds_per_step(self, steps: list[float], begin: float, end: float) -> float:
        """What a step cost the program between `begin` and `end`, when `steps` are the moments at which one ended.

        Raises:
            ValueError: there is less than one step between them.
        """
        ends = [self.at(step) for step in steps]
        begin, end = max(self.at(begin), ends[0]), min(self.at(end), ends[-1])
        first, last = np.interp([begin, end], ends, range(len(ends)))
        if last - first < 1:
            raise ValueError("the program was too short to compare, less than one step: take more --rows")
        return float((end - begin) / (last - first))


def run(endless: subprocess.Popen, program: subprocess.Popen) -> tuple[Clock, Clock]:
    """Let both run in turns until `program` ends, then terminate the endless one, which prints its figures.

    What else this process has started, a Ray say, runs in the turns of `program`.

    Raises:
        ChildProcessError: the endless program ended by itself, and `program` was killed.
    """
    clocks = {endless: Clock(), program: Clock()}
    try:
        _stop(lambda: _others(endless))
        while program.poll() is None and endless.poll() is None:
            _turn(endless, clocks[endless], lambda: _tree(endless))
            _turn(program, clocks[program], lambda: _others(endless))
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
