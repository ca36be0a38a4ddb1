"""`make bench`: the series compared with the usual ways to train, as ratios measured in one run.

Every program is a process of its own. A program that trains takes turns with bare steps, a few seconds each, so that a
machine whose speed changes changes both. The others run one after the other. Writes report/bench.md and bench.png.
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

import interleave
import summary
from helpers import settings
from images import write_jpegs

HERE = Path(__file__).resolve().parent
REPORT = settings.PROJECT / "report"
MARK = "measured: "


def main() -> None:
    """Read the options, measure round by round, and write the report after each."""
    groups = {
        "fit": fit_programs,
        "data": data_programs,
        "stream": stream_programs,
        "scale": scale_programs,
        "online": online_programs,
    }
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the per-row recipe runs only in the first")
    parser.add_argument("--images", type=int, default=6000, help="how many to train on; fewer take less time")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", choices=groups, help="measure one group of programs")
    parser.add_argument("--quick", action="store_true", help="one round, ten minutes: what a user would run instead")
    parser.add_argument("--cluster", action="store_true", help="only `fit()` on three hosts and on one: tools/hosts.py")
    options = parser.parse_args()
    if options.cluster:
        groups = {"cluster": cluster_programs}
    elif options.quick:
        options.repeats, options.images = 1, 2000
        groups = {"fit": fit_programs, "scale": scale_programs}
    elif options.only:
        groups = {options.only: groups[options.only]}
    REPORT.mkdir(exist_ok=True)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        os.environ["TMPDIR"] = scratch  # what a measured program leaves behind is deleted with it
        for number in range(options.repeats):
            rounds.append({})
            for group in groups.values():
                group(rounds[-1], options, scratch, first=number == 0)
            (REPORT / "bench.json").write_text(json.dumps({"options": vars(options), "rounds": rounds}, indent=1))
            summary.write(rounds, vars(options), REPORT)
    print((REPORT / "bench.md").read_text())


def fit_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Train in turns with bare steps: without Ray, with the series, and once with the per-row recipe."""
    size = {"images": options.images, "epochs": options.epochs, "batch": 64}
    figures["dataloader"] = versus_bare_loop("baselines.dataloader", **size)
    figures["torchrun"] = versus_bare_loop("baselines.ddp", processes=2, **size)
    if options.quick:
        for workers, name in ((1, "series"), (2, "series, 2 workers")):
            with warm_ray(workers):
                figures[name] = versus_bare_loop("ray_pipeline.fit", workers=workers, **size)
        return
    figures["series, cold"] = versus_bare_loop("ray_pipeline.fit", workers=1, **size)
    for workers, name in ((1, ""), (2, ", 2 workers")):
        for kind, program in (("series", "fit"), ("plain", "plain"), ("overhead", "fit_overhead")):
            with warm_ray(workers):
                figures[kind + name] = versus_bare_loop(f"ray_pipeline.{program}", workers=workers, **size)
    if first:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            figures["per row"] = versus_bare_loop("baselines.per_row_fit", folder=folder, **size)


@contextlib.contextmanager
def warm_ray(workers: int):
    """Keep Ray running, as `make lab` does for a learner who chose so many workers and has read for a moment."""
    from run_lessons import shared_ray

    before = os.environ.get("TUTORIAL_WORKERS", "")
    os.environ["TUTORIAL_WORKERS"] = str(workers)
    try:
        with shared_ray():
            time.sleep(15)
            yield
    finally:
        os.environ["TUTORIAL_WORKERS"] = before  # an empty one counts as none


def data_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Write, read and prepare images, without training."""
    from run_lessons import shared_ray

    size, jpegs = {"images": 20000, "epochs": 4, "batch": 64}, f"{scratch}/jpegs"
    if first:
        write_jpegs(jpegs, train=9000, test=1000)
    figures["write"] = measure("ray_pipeline.write", images=20000)
    figures["dataloader ingest"] = measure("baselines.dataloader_ingest", **size)
    figures["PIL loop"] = measure("baselines.pil_loop", folder=jpegs)
    with shared_ray():
        figures["ingest"] = measure("ray_pipeline.ingest", **size)
    figures["folder"] = measure("ray_pipeline.folder", path=jpegs)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        figures["per row write"] = measure("baselines.per_row_write", images=20000, folder=folder)
    if first:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            figures["per row ingest"] = measure("baselines.per_row_ingest", folder=folder, **{**size, "epochs": 1})


def scale_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Train with more and more workers on simulated accelerators."""
    for workers in (1, 2, 4, 8):
        figures[f"scale {workers}"] = measure("simulated.scale", workers=workers)


def stream_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Train on once and four times as many images as the object store holds."""
    for times in (1, 4):
        figures[f"stream {times}"] = measure("ray_pipeline.stream", times=times, store_megabytes=400)


def online_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Answer requests over HTTP."""
    figures["online"] = measure("online.answer", count=640)


def cluster_programs(figures: dict, options, scratch: str, first: bool) -> None:
    """Train with three workers on three hosts, which are namespaces, and on one: the same cores do all the work."""
    from hosts import HEAD, Hosts, unavailable

    if reason := unavailable():
        raise SystemExit(f"--cluster can't be measured here: {reason}.")
    arguments = {"images": options.images, "epochs": options.epochs, "batch": 63, "workers": 3}
    command = [sys.executable, HERE / "__main__.py", "--program", "ray_pipeline.fit", json.dumps(arguments)]
    for count in (3, 1):
        print(f"ray_pipeline.fit {arguments} on {count} hosts …", end=" ", flush=True)
        with Hosts(count, cpus=6 // count) as hosts:
            variables = {"RAY_ADDRESS": HEAD, "TUTORIAL_STORAGE": hosts.folder}
            done = hosts.run(1, command, timeout=3600, **variables)
        figures[f"hosts {count}"] = read_figures(done.stdout, done.returncode)["moments"]
        print(f"{figures[f'hosts {count}']['end'] - figures[f'hosts {count}']['fit']:.0f} s", flush=True)


def measure(program: str, **arguments) -> dict:
    """Run one program and return the figures it prints."""
    print(f"{program} {arguments} …", end=" ", flush=True)
    start = time.perf_counter()
    figures = Program(program, **arguments).figures()
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return figures


def versus_bare_loop(program: str, processes: int = 1, **arguments) -> dict:
    """Run a program in turns with bare steps of the same size.

    Returns:
        Seconds for which the program had run at each of the `moments` it returned, and in total, `process`; the
        seconds that each of its `epochs` and its `parts` took. How many CPU cores its `background` kept busy, from CPU
        seconds that it noted in pairs. In `bare`, the seconds that as many bare steps took: the `whole` of its epochs,
        at the average pace, and `epochs`, each at the pace during that very epoch; and bare `images` per second.
    """
    print(f"{program} {arguments} in turns with bare steps …", end=" ", flush=True)
    images, batch = arguments["images"], arguments["batch"]
    bare = Program("baselines.bare_until_terminated", images=images, batch=batch)
    other = Program(program, processes, **arguments)
    try:
        bare_clock, clock = interleave.run(bare, other)
    except ChildProcessError:
        bare.figures()  # ends the bench with what it printed, unless it succeeded
        raise
    figures, steps = other.figures(), bare.figures()["steps"]
    spans, steps_per_epoch = figures.pop("spans"), images // batch
    per_step = bare_clock.seconds_per_step(steps, steps[0], steps[-1])
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
        "whole": per_step * steps_per_epoch * arguments["epochs"],
        "epochs": [bare_clock.seconds_per_step(steps, *span) * steps_per_epoch for span in spans],
        "images": batch / per_step,
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
        """Wait for the end and return the figures that the program, or its rank 0, printed."""
        self.wait()
        with self.output:
            self.output.seek(0)
            printed = self.output.read()
        return read_figures(printed, self.returncode)


def read_figures(printed: str, returncode: int) -> dict:
    """Return the figures in what a program printed; or end the bench when it failed."""
    figures = [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]
    if returncode or not figures:
        raise SystemExit(f"failed:\n{printed[-6000:]}")
    return min(figures, key=lambda one: one.get("rank", 0))


def run_program(program: str, arguments: str) -> None:
    """Run `module.function` with the arguments, a JSON object, and print what it returns."""
    module, function = program.split(".")
    print(f"\n{MARK}{json.dumps(getattr(importlib.import_module(module), function)(**json.loads(arguments)))}")


if __name__ == "__main__":
    sys.path += [str(HERE.parent), str(settings.PROJECT / "notebooks")]  # for what other tools and lesson 12 have
    run_program(*sys.argv[2:4]) if sys.argv[1:2] == ["--program"] else main()
