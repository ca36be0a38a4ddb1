"""The bench's turns: two programs that never run at the same moment, each charged with its own seconds alone."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

BENCH = Path(__file__).resolve().parent / "bench"

TICKS = """
import json, signal, sys, time

ticks, end = [], time.perf_counter() + float(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print(json.dumps(ticks))))
while time.perf_counter() < end:
    ticks.append(time.time())
    time.sleep(0.005)
print(json.dumps(ticks))
"""
PARENT = """
import subprocess, sys

print(subprocess.run([sys.executable, "-c", sys.argv[1], "0.8"], capture_output=True, text=True, check=True).stdout)
"""
TURNS = """
import json, math, subprocess, sys
import turns

turns.SECONDS = 0.2
ticks, parent = sys.argv[1:]
programs = [
    subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, text=True)
    for arguments in ([ticks, "60"], [parent, ticks])
]
clocks = turns.run(*programs)
result = [
    {"ticks": json.loads(program.communicate()[0]), "turns": clock.turns, "whole": clock.at(math.inf)}
    for program, clock in zip(programs, clocks)
]
print(json.dumps(result))
"""


def test_programs_in_turns_run_until_one_ends_and_never_at_the_same_moment_not_even_their_children():
    # in a process of its own: what runs in turns is everything that the process has started, here the tests' Ray, too
    done = subprocess.run([sys.executable, "-c", TURNS, TICKS, PARENT], cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = json.loads(done.stdout)
    for mine, theirs in ((one, other), (other, one)):
        assert len(mine["turns"]) > 1  # it was interrupted, or nothing is shown
        stray = [tick for tick in mine["ticks"] for begin, end in theirs["turns"] if begin + 0.02 < tick < end - 0.02]
        assert not stray
        assert mine["whole"] == sum(end - begin for begin, end in mine["turns"])


def test_a_clock_counts_only_the_seconds_in_which_its_program_ran():
    probe = """
        import math, turns
        clock = turns.Clock()
        clock.turns = [(10.0, 13.0), (20.0, 22.0)]
        print([clock.at(moment) for moment in (5, 11, 15, 21, 30, math.inf)])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(probe)], cwd=BENCH, capture_output=True, text=True)
    assert json.loads(done.stdout) == [0, 1, 3, 4, 5, 5]


def test_a_step_costs_the_seconds_in_which_its_program_ran_and_only_those_of_the_window():
    probe = """
        import turns
        clock = turns.Clock()
        clock.turns = [(10.0, 14.0), (20.0, 26.0)]
        steps = [11, 12, 13, 14, 22, 24, 26]  # each takes one second in the first turn, two in the second
        print([clock.seconds_per_step(steps, *window) for window in ((11, 26), (0, 14), (20, 99), (12, 22))])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(probe)], cwd=BENCH, capture_output=True, text=True)
    assert json.loads(done.stdout) == [1.5, 1, 2, 4 / 3], done.stderr
