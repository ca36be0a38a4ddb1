"""`make bench`: the series beside what a reader would use instead, as ratios measured in one run.

Every program is a process of its own. One that trains runs in turns with bare steps, a few seconds each, so that a
machine whose speed changes changes both; the others run one after the other. Writes report/bench.md and bench.png.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import summary
import turns
from pictures import write_jpegs

from helpers import cluster, settings

HERE = Path(__file__).resolve().parent
REPORT = settings.PROJECT / "report"
MARK = "measured: "


def main() -> None:
    """Read the options, measure round by round, and write the report after each."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the per-row recipe runs in the first alone")
    parser.add_argument("--rows", type=int, default=6000, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", choices=["fit", "data", "stream"], help="measure one group of programs")
    options = parser.parse_args()
    groups = {"fit": fit_programs, "data": data_programs, "stream": stream_programs}
    if options.only:
        groups = {options.only: groups[options.only]}
    REPORT.mkdir(exist_ok=True)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        os.environ["TMPDIR"] = scratch  # what a measured program leaves behind goes with it
        write_jpegs(f"{scratch}/jpegs", train=9000, test=1000)
        for number in range(options.repeats):
            rounds.append({})
            for group in groups.values():
                group(rounds[-1], options, scratch, first=number == 0)
            (REPORT / "bench.json").write_text(json.dumps({"options": vars(options), "rounds": rounds}, indent=1))
            summary.write(rounds, vars(options), REPORT)
    print((REPORT / "bench.md").read_text())


def fit_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Train in turns with bare steps: without Ray, with ours, and once with the per-row recipe."""
    size = {"rows": options.rows, "epochs": options.epochs, "batch": 64}
    figures["dataloader"] = beside_bare("baselines.dataloader", **size)
    figures["torchrun"] = beside_bare("baselines.ddp", processes=2, **size)
    figures["ours, cold"] = beside_bare("ours.fit", workers=1, **size)
    for workers, name in ((1, ""), (2, ", 2 workers")):
        for kind, program in (("ours", "ours.fit"), ("limit", "ours.limit")):
            with warm_ray(workers):
                figures[kind + name] = beside_bare(program, workers=workers, **size)
    if first:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            figures["per row"] = beside_bare("baselines.per_row_fit", folder=folder, **size)


@contextlib.contextmanager
def warm_ray(workers: int):
    """Keep Ray running, as `make lab` does for a reader who chose so many workers and has read a few lines."""
    with mock.patch.dict(os.environ, TUTORIAL_WORKERS=str(workers)), cluster.shared():
        time.sleep(15)
        yield


def data_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Write, read and prepare pictures, without training."""
    size = {"rows": 20000, "epochs": 4, "batch": 64}
    figures["write"] = measure("ours.write", rows=20000)
    figures["dataloader ingest"] = measure("baselines.dataloader_ingest", **size)
    figures["PIL loop"] = measure("baselines.pil_loop", folder=f"{scratch}/jpegs")
    with cluster.shared():
        figures["ingest"] = measure("ours.ingest", **size)
    figures["folder"] = measure("ours.folder", path=f"{scratch}/jpegs")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        figures["per row write"] = measure("baselines.per_row_write", rows=20000, folder=folder)
    if first:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            figures["per row ingest"] = measure("baselines.per_row_ingest", folder=folder, **{**size, "epochs": 1})


def stream_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Stream 1, 4 and 16 times more rows than the object store holds."""
    for times in (1, 4, 16):
        figures[f"stream {times}"] = measure("ours.stream", rows=50000, times=times, store_megabytes=100)


def measure(program: str, **arguments) -> dict:
    """Run one program and return the figures it prints."""
    print(f"{program} {arguments} …", end=" ", flush=True)
    start = time.perf_counter()
    figures = Program(program, **arguments).figures()
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return figures


def beside_bare(program: str, processes: int = 1, **arguments) -> dict:
    """Run a program in turns with bare steps of the same size.

    Returns:
        Seconds for which the program had run: at each of the `moments` it returned, and in all, `process`; and those
        that each of its `epochs` and its `parts` took. How many processors its `background` kept busy, from CPU
        seconds that it noted in pairs. In `bare` the seconds that as many bare steps took: the `whole` of its epochs,
        at the pace of its lifetime, and `epochs`, each at the pace of that very epoch; and bare `pictures` per second.
    """
    print(f"{program} {arguments} in turns with bare steps …", end=" ", flush=True)
    rows, batch = arguments["rows"], arguments["batch"]
    bare = Program("baselines.bare_until_terminated", rows=rows, batch=batch)
    other = Program(program, processes, **arguments)
    try:
        bare_clock, clock = turns.run(bare, other)
    except ChildProcessError:
        bare.figures()  # ends the bench with what it printed, unless it came to its end
        raise
    figures, steps = other.figures(), bare.figures()["steps"]
    spans, per_epoch = figures.pop("spans"), rows // batch
    a_step = bare_clock.seconds_per_step(steps, steps[0], steps[-1])
    figures |= {name: clock.at(moment) for name, moment in figures.pop("moments", {}).items()}
    figures["parts"] = {
        name: sum(clock.at(end) - clock.at(begin) for begin, end in parts)
        for name, parts in figures.pop("parts", {}).items()
    }
    if samples := figures.pop("background", []):
        pairs = list(zip(samples[::2], samples[1::2], strict=True))
        ran = sum(clock.at(end) - clock.at(begin) for (begin, _), (end, _) in pairs)
        figures["background"] = sum(after - before for (_, before), (_, after) in pairs) / ran
    figures["process"] = clock.at(math.inf)
    figures["epochs"] = [clock.at(end) - clock.at(begin) for begin, end in spans]
    figures["bare"] = {
        "whole": a_step * per_epoch * arguments["epochs"],
        "epochs": [bare_clock.seconds_per_step(steps, *span) * per_epoch for span in spans],
        "pictures": batch / a_step,
    }
    print(f"{clock.at(math.inf) + bare_clock.at(math.inf):.0f} s", flush=True)
    return figures


class Program(subprocess.Popen):
    """A measured program, `module.function`, in a process of its own, or in several that torchrun starts."""

    def __init__(self, program: str, processes: int = 1, **arguments):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, str(HERE / "__main__.py"), "--program", program, json.dumps(arguments)]
        self.output = tempfile.TemporaryFile("w+")
        super().__init__(command, stdout=self.output, stderr=self.output)

    def figures(self) -> dict:
        """Wait for the end and return what the program, or its rank 0, printed as figures."""
        self.wait()
        with self.output:
            self.output.seek(0)
            printed = self.output.read()
        figures = [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]
        if self.returncode or not figures:
            raise SystemExit(f"failed:\n{printed[-6000:]}")
        return min(figures, key=lambda one: one.get("rank", 0))


def run_program(program: str, arguments: str) -> None:
    """Run `module.function` with the arguments, a JSON object, and print what it returns."""
    module, function = program.split(".")
    print(f"\n{MARK}{json.dumps(getattr(importlib.import_module(module), function)(**json.loads(arguments)))}")


if __name__ == "__main__":
    run_program(*sys.argv[2:4]) if sys.argv[1:2] == ["--program"] else main()
