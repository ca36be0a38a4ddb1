"""The bench charges each of two programs that take turns with its own seconds alone, and sums up its figures."""

import json
import math
import subprocess
import sys

import pytest

from bench import interleave, summary
from helpers import settings

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
import interleave

interleave.SECONDS = 0.2
ticks, parent = sys.argv[1:]
programs = [
    subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, text=True)
    for arguments in ([ticks, "600"], [parent, ticks])
]
clocks = interleave.run(*programs)
result = [
    {"ticks": json.loads(program.communicate()[0]), "turns": clock.turns, "whole": clock.at(math.inf)}
    for program, clock in zip(programs, clocks)
]
print(json.dumps(result))
"""


def clock_of(*turns):
    clock = interleave.Clock()
    clock.turns = list(turns)
    return clock


def test_turns_never_overlap():
    """Neither those of the programs nor those of their children."""
    # In a process of its own: `run` stops everything that its process has started, here the tests' Ray too.
    command = [sys.executable, "-c", TURNS, TICKS, PARENT]
    done = subprocess.run(command, cwd=settings.PROJECT / "tools/bench", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = json.loads(done.stdout)
    for mine, theirs in ((one, other), (other, one)):
        assert len(mine["turns"]) > 1, "it was not interrupted, so this shows nothing"
        stray = [tick for tick in mine["ticks"] for begin, end in theirs["turns"] if begin + 0.02 < tick < end - 0.02]
        assert not stray
        assert mine["whole"] == sum(end - begin for begin, end in mine["turns"])


def test_clock_counts_only_its_turns():
    clock = clock_of((10.0, 13.0), (20.0, 22.0))
    assert [clock.at(moment) for moment in (5, 11, 15, 21, 30, math.inf)] == [0, 1, 3, 4, 5, 5]


@pytest.mark.parametrize("window, seconds", [((11, 26), 1.5), ((0, 14), 1), ((20, 99), 2), ((12, 22), 4 / 3)])
def test_clock_counts_steps_inside_the_window(window, seconds):
    clock = clock_of((10.0, 14.0), (20.0, 26.0))
    steps = [11, 12, 13, 14, 22, 24, 26]  # one second each in the first turn, two in the second
    assert clock.seconds_per_step(steps, *window) == pytest.approx(seconds)


def test_clock_refuses_less_than_one_step():
    with pytest.raises(ValueError, match="less than one step: take more --images"):
        clock_of((10.0, 14.0)).seconds_per_step([11, 12, 13], 11.1, 11.9)


def test_summary_writes_what_was_measured(tmp_path):
    """Ratios to the bare steps, with their spread; rows of programs that did not run are left out."""
    fit = {"fit": 5.0, "train_function": 7.0, "first_step": 8.0, "epochs": [10.0, 5.0]}
    rounds = [
        {
            "series": {**fit, "end": 5 + seconds, "bare": {"whole": 20.0, "epochs": [4.0, 4.0], "images": 100.0}},
            "dataloader": {"process": 48.0, "epochs": [20.0], "bare": {"whole": 40.0, "epochs": [20.0]}},
        }
        for seconds in (22.0, 24.0, 30.0)
    ]
    summary.write(rounds, {"images": 6000, "epochs": 2}, tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "6,000 images, 2 epochs" in text and "rounds: 3" in text
    assert "| whole `fit()`, Ray running ÷ bare steps | 1.20 (1.10–1.50) |" in text
    assert "| whole `fit()`, Ray running ÷ whole DataLoader program | 1.00 (0.92–1.25) |" in text
    assert "| steady epoch: throughput of the series ÷ bare | 0.80 (0.80–0.80) |" in text
    assert "| from `fit()` to the first step, Ray running | 3.0 (3.0–3.0) s |" in text
    assert "torchrun" not in text and "Parquet" not in text
    assert (tmp_path / "bench.png").exists()


def test_summary_writes_the_latency_of_serve(tmp_path):
    figures = {"p50": 40.0, "p95": 80.0, "rate": 300.0}
    summary.write([{"online": {"batches": figures, "single": figures}}], {"images": 1, "epochs": 1}, tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert text.count("Ray Serve") == 6 and "predicted in batches: p95 | 80 (one measurement) ms |" in text


def test_summary_compares_three_hosts_with_one(tmp_path):
    one, three = ({"fit": 5.0, "first_step": 5 + step, "end": 5 + end} for step, end in ((10, 40), (15, 50)))
    summary.write([{"hosts 3": three, "hosts 1": one}], {"images": 1, "epochs": 1}, tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "| whole `fit()`, 3 workers on 3 hosts ÷ on 1 host | 1.25 (one measurement) |" in text
    assert "| from `fit()` to the first step, 3 workers on 3 hosts ÷ on 1 host | 1.50 (one measurement) |" in text


def test_a_program_finds_what_stands_next_to_lessons():
    """Each program is a process of its own, and the one that serves needs lesson 12's module."""
    command = [sys.executable, "tools/bench", "--program", "online.nothing", "{}"]
    result = subprocess.run(command, cwd=settings.PROJECT, capture_output=True, text=True)
    assert "has no attribute 'nothing'" in result.stderr
