"""Plots that several lessons use or that must fit long names, and `describe`, which gives any plot its alt text."""

import contextlib
import functools
import io
import warnings
from unicodedata import east_asian_width

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

BLUE, ORANGE, GREEN, GREY = COLOURS = ("#2a6fdb", "#e07b27", "#2f9e62", "#8a8f98")
_print_once = functools.cache(print)


class AltFigure(Figure):
    """A figure that a notebook shows with its alt text `alt`, and sharp on a screen with twice the usual pixels."""

    alt = ""

    def _repr_mimebundle_(self, **_):
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=144, bbox_inches="tight")
        content, metadata = Image(png.getvalue(), retina=True, alt=self.alt)._repr_mimebundle_()
        return {**content, "text/plain": self.alt}, metadata


subplots = functools.partial(plt.subplots, FigureClass=AltFigure)


def describe(figure: AltFigure, title: str, alt: str) -> AltFigure:
    """Finish a figure of `subplots()`: give it a title and alt text. The cell that returns it shows it once."""
    figure.alt = f"{title}. {alt}.".encode(errors="replace").decode()
    figure.suptitle(drawable([title])[0], fontsize=11)
    figure.tight_layout()
    plt.close(figure)  # the cell shows the figure that it returns; without this it would be shown twice
    return figure


def drawable(texts: list[str], longest: int = 200) -> list[str]:
    """Return texts as matplotlib should draw them: no formulas between $, in a font that has them, shortened inside."""
    short = []
    for text in texts:
        text = text.encode(errors="replace").decode()  # a folder's name need not be UTF-8
        wide = sum(east_asian_width(char) in "WF" for char in text)  # such as Chinese, twice as wide as Latin
        most = longest * len(text) // max(1, len(text) + wide)
        short.append(text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}")
    _add_fonts(frozenset("".join(short)))
    return [text.replace("$", r"\$") for text in short]


def name_classes(class_names: list[str], *axes) -> None:
    """Write class names along axes such as `axes.xaxis`: shortened, slanted if long, every n-th if many."""
    step = -(-len(class_names) // 30)
    names = drawable(class_names[::step], longest=14)
    font = {"family": plt.rcParams["font.family"], "size": 9 if len(names) <= 15 else 7}
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    for axis in axes:
        is_crowded = axis.axis_name == "x" and max(map(len, names)) * len(names) > 70
        axis.set_ticks(range(0, len(class_names), step), names, **font, **slanted if is_crowded else {})


def show_images(images: np.ndarray, captions: list[str], title: str, columns: int = 8) -> AltFigure:
    """Draw images, uint8 (count, height, width, 3), in a grid, each with its caption above."""
    rows = max(1, -(-len(images) // columns))
    drawn = [drawable(caption.splitlines(), longest=22) for caption in captions]
    size = 8 if all(len(line) <= 14 for lines in drawn for line in lines) else 6
    height = 1.2 + 0.15 * max(map(len, drawn), default=0)
    figure, axes = subplots(rows, columns, figsize=(1.15 * columns, height * rows + 0.3), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, lines in zip(axes.flat, images, drawn, strict=False):
        axis.imshow(image)
        axis.set_title("\n".join(lines), fontsize=size)
    named = ", ".join(" ".join(caption.split()) for caption in captions[:8]) + (" …" if len(captions) > 8 else "")
    return describe(figure, title, f"{len(images)} images in a grid: {named}")


def class_balance(counts: dict[str, list[int]], class_names: list[str]) -> AltFigure:
    """Draw how many images of each class every split has; `counts` is `{split: [count of class 0, …]}`."""
    figure, axis = subplots(figsize=(8, 3.2))
    kind = {"kind": "bar", "width": 0.8, "rot": 0} if len(class_names) <= 50 else {"drawstyle": "steps-mid", "lw": 1}
    pd.DataFrame(counts).plot(ax=axis, color=COLOURS, **kind)
    name_classes(class_names, axis.xaxis)
    axis.set(ylabel="images", ylim=(0, None))
    axis.legend(frameon=False, ncols=len(counts), loc="lower left", bbox_to_anchor=(0, 1))
    ranges = ", ".join(f"{split} {min(values)} to {max(values)}" for split, values in counts.items())
    return describe(figure, "Images per class", f"{len(class_names)} classes, images in each: {ranges}")


def bars(values: dict[str, float], unit: str, title: str) -> AltFigure:
    """Draw one horizontal bar per name, with its number next to it."""
    figure, axis = subplots(figsize=(8, 0.55 * len(values) + 0.9))
    places = 0 if max(values.values()) >= 100 else 1
    axis.bar_label(axis.barh(list(values), list(values.values()), color=BLUE), fmt=f" {{:,.{places}f}}")
    axis.set(xlabel=unit, xmargin=0.15, yinverted=True)
    numbers = ", ".join(f"{name} {value:,.{places}f}" for name, value in values.items())
    return describe(figure, title, f"Bars, {unit}: {numbers}")


def stacked_bars(table, unit: str, title: str) -> AltFigure:
    """Draw a DataFrame as one horizontal bar per row, stacked from one part per column."""
    figure, axis = subplots(figsize=(8, 0.5 * len(table) + 1.4))
    table.plot.barh(ax=axis, stacked=True, width=0.8, color=[*COLOURS, "#7c3aed", "#b0413e"], edgecolor="white")
    axis.set(xlabel=unit, ylabel="", yinverted=True)
    axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    bars = zip(table.index, table.sum(axis=1), table.idxmax(axis=1), strict=True)
    largest = ", ".join(f"{name}: {total:.1f}, most of it {part}" for name, total, part in bars)
    return describe(figure, title, f"One bar per row, {unit}. {largest}")


def learning_curves(history: list[dict]) -> AltFigure:
    """Draw loss and accuracy on the training and validation splits, from the dicts that the train loop returns."""
    table, changes = pd.DataFrame(history, index=[metrics["epoch"] + 1 for metrics in history]), []
    figure, axes = subplots(1, 2, figsize=(9, 3))
    for axis, kind in zip(axes, ("loss", "accuracy"), strict=True):
        curves = table[[f"train_{kind}", f"validation_{kind}"]].set_axis(["train", "validation"], axis=1)
        ticks = table.index[:: max(1, len(table) // 10)]
        curves.plot(ax=axis, style="o-", color=COLOURS[:2], xlabel="epoch", ylabel=kind, xticks=ticks, grid=True)
        changes += [f"{split} {kind} from {y.iloc[0]:.2f} to {y.iloc[-1]:.2f}" for split, y in curves.items()]
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1.02)
    return describe(figure, "Learning curves", f"Over {len(history)} epochs: {', '.join(changes)}")


def steps_over_time(entries: list[dict], steps_per_epoch: int, ends: tuple[str, ...] = ()) -> AltFigure:
    """Draw a step log: `time` in seconds, `process` and `step`; `ends` says why each process ended, except the last."""
    figure, axis = subplots(figsize=(8, 3.2))
    table, lives = pd.DataFrame(entries), []
    processes = table.assign(time=table["time"] - table["time"].iloc[0]).groupby("process", sort=False)
    for number, (_, mine) in enumerate(processes):
        colour = COLOURS[number % len(COLOURS)]
        end = f": {ends[number]}" if number < len(ends) else ""
        axis.plot("time", "step", ".-", data=mine, color=colour, label=f"process {number + 1}{end}")
        if number + 1 < processes.ngroups:
            axis.plot("time", "step", "x", data=mine.tail(1), color=colour, markersize=12, markeredgewidth=3, label="_")
        lives.append(f"{mine['step'].iloc[0]} to {mine['step'].iloc[-1]}{end}")
    for step in range(steps_per_epoch, table["step"].max() + 1, steps_per_epoch):
        axis.axhline(step, color=GREY, linewidth=0.8, linestyle=":")
    axis.set(xlabel="seconds since the first step", ylabel="training step")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    alt = f"One line per process: steps {', then '.join(lives)}"
    return describe(figure, "Steps taken; × a process ends early, dotted: the end of an epoch", alt)


@functools.cache
def _add_fonts(characters: frozenset[str]) -> None:
    """Let matplotlib fall back on this machine's fonts for characters that its own lacks; if none has them, say so."""
    families = plt.rcParams["font.family"]
    fonts = [FT2Font(font_manager.findfont(font_manager.FontProperties(family=[name]))) for name in families]
    visible = filter(str.isprintable, characters)
    missing = {char for char in visible if not any(font.get_char_index(ord(char)) for font in fonts)}
    paths = [path for path in font_manager.findSystemFonts() if "LastResort" not in path] if missing else []
    for path in sorted(paths, key=lambda path: ("Regular" not in path, path)):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a font of pixels, which matplotlib can't scale
            font = FT2Font(path)
            found = {char for char in missing if font.get_char_index(ord(char))}
            if found:
                font_manager.fontManager.addfont(path)
                plt.rcParams["font.family"] = families = [*families, font.family_name]
                missing -= found
    if missing:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # said per glyph and drawing otherwise
        _print_once("No font on this machine has all characters of the names: install one, such as Noto Sans CJK.")
