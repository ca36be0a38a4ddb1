"""The figures of `make bench` as a Markdown table and a picture."""

from statistics import median

import matplotlib.pyplot as plt


def write(rounds: list[dict], options: dict, folder) -> None:
    """Write `bench.md` and `bench.png` into `folder` from what all rounds measured."""
    rows = [row for row in _rows(rounds) if row]
    lines = [
        "# Measured",
        "",
        f"{options['rows']:,} pictures, {options['epochs']} epochs, batch 64, {len(rounds)} rounds in one run.",
        "The median, and the smallest and largest in brackets.",
        "",
        "| what | ratio or figure |",
        "| --- | --- |",
        *[f"| {what} | {figure} |" for what, figure in rows],
    ]
    (folder / "bench.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if "bare" in rounds[0]:
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

    def bare(one):
        return one["bare"]["total"]

    def steady(one, name):
        return median(one["bare"]["epochs"]) / median(one[name]["epochs"][1:])

    def rate(one, name):
        return one[name]["rows"] / median(one[name]["epochs"][1:] or one[name]["epochs"])

    yield row("bare loop, pictures/s", lambda one: one["bare"]["pictures"] / bare(one), 0)
    yield row("whole `fit()`, Ray warm ÷ bare steps", lambda one: one["ours"]["total"] / bare(one))
    yield row("whole program, Ray started for it ÷ bare steps", lambda one: one["ours, cold"]["cold"] / bare(one))
    yield row("whole `fit()`, 2 workers ÷ bare steps", lambda one: one["ours, 2 workers"]["total"] / bare(one))
    yield row("whole DataLoader program ÷ bare steps", lambda one: one["dataloader"]["process"] / bare(one))
    yield row("whole torchrun program, 2 processes ÷ bare steps", lambda one: one["torchrun"]["process"] / bare(one))
    yield row("per-row recipe's `fit()` ÷ bare steps", lambda one: one["per row"]["total"] / bare(one))
    yield row("limit: `fit()` around the bare loop ÷ bare steps", lambda one: one["limit"]["total"] / bare(one))
    yield row("whole `fit()`, Ray warm ÷ that limit", lambda one: one["ours"]["total"] / one["limit"]["total"])
    yield row("from `fit()` to the train function, limit", lambda one: one["limit"]["begin"], 1, " s")
    yield row("from `fit()` to the first step, Ray warm", lambda one: one["ours"]["first_step"], 1, " s")
    yield row("the same, 2 workers", lambda one: one["ours, 2 workers"]["first_step"], 1, " s")
    yield row("steady epoch: our throughput ÷ bare", lambda one: steady(one, "ours"))
    yield row("steady epoch: 2 workers ÷ bare", lambda one: steady(one, "ours, 2 workers"))
    yield row("limit: steady epoch of the bare loop beside an idle Ray", lambda one: steady(one, "bare, Ray idle"))
    yield row("limit: steady epoch of the bare loop in `fit()`", lambda one: steady(one, "limit"))
    yield row("limit: the same, 2 workers", lambda one: steady(one, "limit, 2 workers"))
    yield row("steady epoch: DataLoader ÷ bare", lambda one: steady(one, "dataloader"))
    yield row("steady epoch: torchrun, 2 processes ÷ bare", lambda one: steady(one, "torchrun"))
    yield row("steady epoch: per-row recipe ÷ bare", lambda one: steady(one, "per row"))
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
    yield row(
        "folder of 10,000 JPEGs to Parquet ÷ a PIL loop over it",
        lambda one: one["folder"]["seconds"] / one["PIL loop"]["seconds"],
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


def _has(compute, one: dict) -> bool:
    try:
        compute(one)
        return True
    except KeyError:
        return False


def _draw(rounds: list[dict], path) -> None:
    """Bars: the whole of each program over the bare steps, with the spread of the rounds."""
    programs = {
        "bare steps": ("bare", "total"),
        "ours, Ray warm": ("ours", "total"),
        "ours, Ray cold": ("ours, cold", "cold"),
        "ours, 2 workers": ("ours, 2 workers", "total"),
        "DataLoader": ("dataloader", "process"),
        "torchrun, 2 processes": ("torchrun", "process"),
        "per-row recipe": ("per row", "total"),
    }
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for place, (name, figure_of) in enumerate(reversed(programs.items())):
        program, value = figure_of
        ratios = [one[program][value] / one["bare"]["total"] for one in rounds if program in one]
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
