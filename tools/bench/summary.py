"""The figures of `make bench` as a Markdown table and a bar chart."""

from statistics import median

import matplotlib.pyplot as plt

PARTS = {
    "start": "start of the processes",
    "training": "training, including the wait for first batches",
    "evaluation": "evaluation, checkpoints and reports, which the bare steps do not have",
    "end": "end of the processes",
}


def write(rounds: list[dict], options: dict, folder) -> None:
    """Write `bench.md` and `bench.png` into `folder` from what all rounds measured."""
    rows = [row for row in _rows(rounds) if row]
    lines = [
        "# Measured",
        "",
        f"{options['images']:,} images, {options['epochs']} epochs, batch {63 if options.get('cluster') else 64}, "
        f"in one run; rounds: {len(rounds)}.",
        "The median, and the smallest and largest in brackets.",
        "",
        "| what | ratio or figure |",
        "| --- | --- |",
        *[f"| {what} | {figure} |" for what, figure in rows],
    ]
    (folder / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if "series" in rounds[0]:
        _draw(rounds, folder / "bench.png")


def _rows(rounds: list[dict]):
    def each(compute, digits=2, unit=""):
        values = [compute(one) for one in rounds if _has(compute, one)]
        if not values:
            return None
        spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else " (one measurement)"
        return f"{median(values):.{digits}f}{spread}{unit}"

    def row(what, compute, digits=2, unit=""):
        figure = each(compute, digits, unit)
        return figure and (what, figure)

    def whole(name, begin="fit"):
        return lambda one: _whole(one[name], begin)

    def versus(name, other, begin=None):
        return lambda one: whole(name)(one) / whole(other, begin)(one)

    def steady(name):
        def compute(one):
            pairs = list(zip(one[name]["bare"]["epochs"], one[name]["epochs"], strict=True))
            return median(bare / measured for bare, measured in pairs[1:] or pairs)

        return compute

    def seconds(name, moment):
        return lambda one: one[name][moment] - one[name]["fit"]

    def rate(one, name):
        return one[name]["images"] / median(one[name]["epochs"][1:] or one[name]["epochs"])

    yield row("bare loop, images per second", lambda one: one["series"]["bare"]["images"], 0)
    yield row("whole `fit()`, Ray running ÷ bare steps", whole("series"))
    yield row("whole program, Ray started for it ÷ bare steps", whole("series, cold", "connect"))
    yield row("whole `fit()`, 2 workers ÷ bare steps", whole("series, 2 workers"))
    yield row("whole DataLoader program ÷ bare steps", whole("dataloader", None))
    yield row("whole torchrun program, 2 processes ÷ bare steps", whole("torchrun", None))
    yield row("whole `fit()`, Ray running ÷ whole DataLoader program", versus("series", "dataloader"))
    yield row("whole `fit()`, 2 workers ÷ whole torchrun program", versus("series, 2 workers", "torchrun"))
    yield row("per-row recipe's `fit()` ÷ bare steps", whole("per row"))
    for many in ("", ", 2 workers"):
        what, lowest = "whole `fit()`" + (many or ", Ray running"), f"plain{many}"
        yield row(f"`fit()` of a plain Ray program{many} ÷ bare steps", whole(lowest))
        yield row(f"{what} ÷ that of a plain Ray program", versus(f"series{many}", lowest, "fit"))
        yield row(f"from its `fit()` to the first step{many}", seconds(lowest, "first_step"), 1, " s")
        yield row(f"steady epoch: a plain Ray program{many} ÷ bare", steady(lowest))
    yield row("overhead: `fit()` around the bare loop ÷ bare steps", whole("overhead"))
    yield row("whole `fit()`, Ray running ÷ overhead", versus("series", "overhead", "fit"))
    yield row("overhead: the same, 2 workers", whole("overhead, 2 workers"))
    for part, named in PARTS.items():
        yield row(
            f"of `fit()`, Ray running: {named} ÷ bare steps",
            lambda one, part=part: one["series"]["parts"][part] / one["series"]["bare"]["whole"],
        )
    yield row("CPU cores kept busy by Ray's other processes in training", lambda one: one["series"]["background"])
    yield row("the same around the bare loop", lambda one: one["overhead"]["background"])
    yield row("from `fit()` to the train function, bare loop", seconds("overhead", "train_function"), 1, " s")
    yield row("from `fit()` to the train function, Ray running", seconds("series", "train_function"), 1, " s")
    yield row("from `fit()` to the first step, Ray running", seconds("series", "first_step"), 1, " s")
    yield row("the same, 2 workers", seconds("series, 2 workers", "first_step"), 1, " s")
    yield row("steady epoch: throughput of the series ÷ bare", steady("series"))
    yield row("steady epoch: the same, 2 workers", steady("series, 2 workers"))
    yield row("steady epoch: bare loop in `fit()` ÷ bare", steady("overhead"))
    yield row("steady epoch: the same, 2 workers", steady("overhead, 2 workers"))
    yield row("steady epoch: DataLoader ÷ bare", steady("dataloader"))
    yield row("steady epoch: torchrun, 2 processes ÷ bare", steady("torchrun"))
    yield row("steady epoch: per-row recipe ÷ bare", steady("per row"))
    yield row(
        "ingest alone: the series ÷ DataLoader with 2 processes",
        lambda one: rate(one, "ingest") / rate(one, "dataloader ingest"),
    )
    yield row(
        "ingest alone: the series ÷ per-row recipe", lambda one: rate(one, "ingest") / rate(one, "per row ingest")
    )
    yield row("ingest alone: the series, images per second", lambda one: rate(one, "ingest"), 0)
    yield row(
        "images to Parquet: per-row recipe's time ÷ the series' time",
        lambda one: one["per row write"]["seconds"] / one["write"]["seconds"],
    )
    yield row("images to Parquet: peak memory above the array", lambda one: one["write"]["megabytes"], 0, " MB")
    yield row("images to Parquet: the per-row recipe's", lambda one: one["per row write"]["megabytes"], 0, " MB")
    yield row(
        "folder of 10,000 JPEGs to Parquet: time ÷ a PIL loop's time",
        lambda one: one["folder"]["again"] / one["PIL loop"]["seconds"],
    )
    yield row("the same, as the first use of Ray Data", lambda one: one["folder"]["first"] / one["PIL loop"]["seconds"])
    yield row(
        "images of 4× the object store: time per image ÷ that of 1×",
        lambda one: sum(one["stream 4"]["seconds"]) / sum(one["stream 1"]["seconds"]) / 4,
    )
    yield row(
        "images of 4× the object store: memory, the store's included ÷ that of 1×",
        lambda one: one["stream 4"]["megabytes"] / one["stream 1"]["megabytes"],
    )
    yield row("images of 4× the object store: spilled to disk", lambda one: one["stream 4"]["spilled"], 0, " MB")
    for workers in (1, 2, 4, 8):
        yield row(
            f"simulated accelerators, {workers} workers: time of the steps ÷ of the epoch",
            lambda one, workers=workers: one[f"scale {workers}"]["efficiency"],
            3,
        )
    for number, epoch in enumerate(("first", "second")):
        yield row(
            f"images of 4× the object store: from the start of the {epoch} epoch to its first step",
            lambda one, number=number: one["stream 4"]["first_batch"][number],
            1,
            " s",
        )
    for moment, what in (("end", "whole `fit()`"), ("first_step", "from `fit()` to the first step")):
        yield row(
            f"{what}, 3 workers on 3 hosts ÷ on 1 host",
            lambda one, moment=moment: seconds("hosts 3", moment)(one) / seconds("hosts 1", moment)(one),
        )
    for kind, batching in (("batches", "in batches"), ("single", "one by one")):
        for figure, unit in (("p50", " ms"), ("p95", " ms"), ("rate", " requests per second")):
            yield row(
                f"Ray Serve, 2 replicas, 16 requests at the same time, predicted {batching}: {figure}",
                lambda one, kind=kind, figure=figure: one["online"][kind][figure],
                0,
                unit,
            )


def _whole(figures: dict, begin: str | None) -> float:
    """The seconds from the moment `begin` to the end, or of the whole process, divided by those of the bare steps."""
    seconds = figures["end"] - figures[begin] if begin else figures["process"]
    return seconds / figures["bare"]["whole"]


def _has(compute, one: dict) -> bool:
    try:
        compute(one)
        return True
    except KeyError:
        return False


def _draw(rounds: list[dict], path) -> None:
    """One bar per program: its whole time divided by that of the bare steps, with the spread of the rounds."""
    programs = {
        "the series, Ray running": ("series", "fit"),
        "the series, Ray started for it": ("series, cold", "connect"),
        "the series, 2 workers": ("series, 2 workers", "fit"),
        "DataLoader": ("dataloader", None),
        "torchrun, 2 processes": ("torchrun", None),
        "per-row recipe": ("per row", "fit"),
    }
    programs = {name: figure for name, figure in programs.items() if any(figure[0] in one for one in rounds)}
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for place, (name, (program, begin)) in enumerate(reversed(programs.items())):
        ratios = [_whole(one[program], begin) for one in rounds if program in one]
        middle = median(ratios)
        axes.barh(place, middle, color="tab:blue" if name.startswith("the series") else "tab:gray")
        axes.plot([min(ratios), max(ratios)], [place, place], color="black")
        axes.text(max(ratios) + 0.05, place, f"{middle:.2f}", va="center")
    axes.set_yticks(range(len(programs)), list(reversed(programs)))
    axes.set_xlabel("time of the whole program ÷ time of the bare steps")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
