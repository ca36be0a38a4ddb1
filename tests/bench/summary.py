"""The figures of `make bench` as a Markdown table and a picture."""

from statistics import median

import matplotlib.pyplot as plt

PARTS = {
    "start": "start of the processes",
    "training": "training, with the wait for first batches and with Ray's other processes beside it",
    "evaluation": "evaluation, checkpoints and reports, which the bare steps do without",
    "end": "end of the processes",
}


def write(rounds: list[dict], options: dict, folder) -> None:
    """Write `bench.md` and `bench.png` into `folder` from what all rounds measured."""
    rows = [row for row in _rows(rounds) if row]
    lines = [
        "# Measured",
        "",
        f"{options['rows']:,} pictures, {options['epochs']} epochs, batch 64, in one run; rounds: {len(rounds)}.",
        "The median, and the smallest and largest in brackets.",
        "",
        "| what | ratio or figure |",
        "| --- | --- |",
        *[f"| {what} | {figure} |" for what, figure in rows],
    ]
    (folder / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if "ours" in rounds[0]:
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

    def steady(name):
        def compute(one):
            pairs = list(zip(one[name]["bare"]["epochs"], one[name]["epochs"], strict=True))
            return median(bare / ours for bare, ours in pairs[1:] or pairs)

        return compute

    def seconds(name, moment):
        return lambda one: one[name][moment] - one[name]["fit"]

    def rate(one, name):
        return one[name]["rows"] / median(one[name]["epochs"][1:] or one[name]["epochs"])

    yield row("bare loop, pictures/s", lambda one: one["ours"]["bare"]["pictures"], 0)
    yield row("whole `fit()`, Ray warm ÷ bare steps", whole("ours"))
    yield row("whole program, Ray started for it ÷ bare steps", whole("ours, cold", "connect"))
    yield row("whole `fit()`, 2 workers ÷ bare steps", whole("ours, 2 workers"))
    yield row("whole DataLoader program ÷ bare steps", whole("dataloader", None))
    yield row("whole torchrun program, 2 processes ÷ bare steps", whole("torchrun", None))
    yield row("per-row recipe's `fit()` ÷ bare steps", whole("per row"))
    yield row("limit: `fit()` around the bare loop ÷ bare steps", whole("limit"))
    yield row("whole `fit()`, Ray warm ÷ that limit", lambda one: whole("ours")(one) / whole("limit")(one))
    yield row("limit: the same, 2 workers", whole("limit, 2 workers"))
    for part, named in PARTS.items():
        yield row(
            f"of `fit()`, Ray warm: {named} ÷ bare steps",
            lambda one, part=part: one["ours"]["parts"][part] / one["ours"]["bare"]["whole"],
        )
    yield row("processors kept busy by Ray's other processes in training", lambda one: one["ours"]["background"])
    yield row("the same around the bare loop", lambda one: one["limit"]["background"])
    yield row("from `fit()` to the train function, limit", seconds("limit", "train_function"), 1, " s")
    yield row("from `fit()` to the train function, Ray warm", seconds("ours", "train_function"), 1, " s")
    yield row("from `fit()` to the first step, Ray warm", seconds("ours", "first_step"), 1, " s")
    yield row("the same, 2 workers", seconds("ours, 2 workers", "first_step"), 1, " s")
    yield row("steady epoch: our throughput ÷ bare", steady("ours"))
    yield row("steady epoch: 2 workers ÷ bare", steady("ours, 2 workers"))
    yield row("limit: steady epoch of the bare loop in `fit()`", steady("limit"))
    yield row("limit: the same, 2 workers", steady("limit, 2 workers"))
    yield row("steady epoch: DataLoader ÷ bare", steady("dataloader"))
    yield row("steady epoch: torchrun, 2 processes ÷ bare", steady("torchrun"))
    yield row("steady epoch: per-row recipe ÷ bare", steady("per row"))
    yield row(
        "ingest alone: ours ÷ DataLoader with 2 processes",
        lambda one: rate(one, "ingest") / rate(one, "dataloader ingest"),
    )
    yield row("ingest alone: ours ÷ per-row recipe", lambda one: rate(one, "ingest") / rate(one, "per row ingest"))
    yield row("ingest alone: ours, rows/s", lambda one: rate(one, "ingest"), 0)
    yield row(
        "Parquet: per-row recipe's time ÷ ours", lambda one: one["per row write"]["seconds"] / one["write"]["seconds"]
    )
    yield row("Parquet: our peak memory above the array", lambda one: one["write"]["megabytes"], 0, " MB")
    yield row("Parquet: the per-row recipe's", lambda one: one["per row write"]["megabytes"], 0, " MB")
    folder = "folder of 10,000 JPEGs to Parquet ÷ a PIL loop over it"
    yield row(folder, lambda one: one["folder"]["again"] / one["PIL loop"]["seconds"])
    yield row(
        "the same, the first thing that Ray Data does", lambda one: one["folder"]["first"] / one["PIL loop"]["seconds"]
    )
    for times in (4, 16):
        yield row(
            f"{times}× the rows: time ÷ {times}× the time",
            lambda one, times=times: one[f"stream {times}"]["seconds"] / times / one["stream 1"]["seconds"],
        )
        yield row(
            f"{times}× the rows: memory ÷ memory of 1×",
            lambda one, times=times: one[f"stream {times}"]["megabytes"] / one["stream 1"]["megabytes"],
        )
    # The first rows wait for processes to start; what is left when 1× is taken away does not.
    yield row(
        "time for a row, from 4× to 16× the rows ÷ from 1× to 4×",
        lambda one: (
            (one["stream 16"]["seconds"] - one["stream 4"]["seconds"])
            / (one["stream 4"]["seconds"] - one["stream 1"]["seconds"])
            / 4
        ),
    )
    yield row("memory at 16× the rows", lambda one: one["stream 16"]["megabytes"], 0, " MB")


def _whole(figures: dict, begin: str | None) -> float:
    """The seconds from the moment `begin` to the end, or of the whole process, over those of the bare steps."""
    seconds = figures["end"] - figures[begin] if begin else figures["process"]
    return seconds / figures["bare"]["whole"]


def _has(compute, one: dict) -> bool:
    try:
        compute(one)
        return True
    except KeyError:
        return False


def _draw(rounds: list[dict], path) -> None:
    """Bars: the whole of each program over the bare steps, with the spread of the rounds."""
    programs = {
        "ours, Ray warm": ("ours", "fit"),
        "ours, Ray cold": ("ours, cold", "connect"),
        "ours, 2 workers": ("ours, 2 workers", "fit"),
        "DataLoader": ("dataloader", None),
        "torchrun, 2 processes": ("torchrun", None),
        "per-row recipe": ("per row", "fit"),
    }
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for place, (name, figure_of) in enumerate(reversed(programs.items())):
        program, begin = figure_of
        ratios = [_whole(one[program], begin) for one in rounds if program in one]
        middle = median(ratios)
        axes.barh(place, middle, color="tab:blue" if name.startswith("ours") else "tab:gray")
        axes.plot([min(ratios), max(ratios)], [place, place], color="black")
        axes.text(max(ratios) + 0.05, place, f"{middle:.2f}", va="center")
    axes.set_yticks(range(len(programs)), list(reversed(programs)))
    axes.set_xlabel("time of the whole program ÷ time of the bare steps")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
