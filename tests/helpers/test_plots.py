"""Every plot can be drawn, also from unusual data, and is shown once, sharp and with alt text."""

import base64
import functools
import io
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib import font_manager, get_data_path
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from helpers import plots

IMAGES = np.zeros((9, 32, 32, 3), np.uint8)
LONG = [f"a class whose name has sixty letters or even a few more, number {n}" for n in range(25)]
ODD = ["$a$ and $b_{", "two\nlines", "not UTF-8 \udcff", "", "قطة", "c" * 300]
MANY = [f"n{n:08d}" for n in range(1000)]
HISTORY = [
    {"epoch": n, "train_loss": 1 / (n + 1), "validation_loss": 0.5, "train_accuracy": 0.5, "validation_accuracy": 0.6}
    for n in range(30)
]
ENTRIES = [
    {"time": 10.0 * process + step, "process": process, "step": step} for process in range(6) for step in range(1, 4)
]


def balance(names):
    return plots.class_balance({split: [3] * len(names) for split in ("train", "validation", "test")}, names)


def confusion(names):
    """Lesson 05 draws scikit-learn's matrix into one of our figures."""
    figure, axes = plots.subplots()
    ConfusionMatrixDisplay(np.eye(len(names))).plot(ax=axes, include_values=len(names) <= 20)
    plots.name_classes(names, axes.xaxis, axes.yaxis)
    return plots.describe(figure, "Predictions and true classes", "All of them are on the diagonal")


@pytest.fixture
def fonts(monkeypatch, request):
    """Matplotlib as in a new kernel, on a machine that has only the fonts in `request.param` installed."""
    plots._add_fonts.cache_clear()
    monkeypatch.setattr(plots, "_print_once", functools.cache(print))
    paths = [f"{get_data_path()}/fonts/ttf/{name}" for name in request.param]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    with plt.rc_context(), warnings.catch_warnings():
        yield
    plots._add_fonts.cache_clear()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.show_images(IMAGES, ["a"] * 9, "Nine images"),
        lambda: plots.show_images(IMAGES[:0], [], "No image"),
        lambda: plots.show_images(IMAGES[:6], ODD, "$5 or $10"),
        lambda: balance(["dark", "light"]),
        lambda: balance(LONG),
        lambda: balance(ODD),
        lambda: balance(MANY),
        lambda: confusion(["dark", "light"]),
        lambda: confusion(ODD),
        lambda: confusion(MANY),
        lambda: plots.bars({"map": 10.0, "map_batches": 1000.0}, "images per second", "Rates"),
        lambda: plots.stacked_bars(pd.DataFrame({"data": [1.0, 2], "step": [3.0, 1]}, index=["a", "b"]), "s", "Parts"),
        lambda: plots.learning_curves(HISTORY),
        lambda: plots.learning_curves(HISTORY[:1]),
        lambda: plots.steps_over_time(ENTRIES, 2),
    ],
)
def test_plots_are_shown_once_with_alt_text(draw):
    figure = draw()
    assert not plt.get_fignums(), "an open figure would be shown a second time"
    content, metadata = DisplayFormatter().format(figure)
    shown = metadata["image/png"]
    assert len(shown["alt"]) > 20 and shown["alt"].endswith("."), "no words for those who can't see it"
    assert content["text/plain"] == shown["alt"]
    json.dumps(content).encode()
    json.dumps(metadata, ensure_ascii=False).encode()
    assert 0 < shown["width"] <= 1000


def test_plots_are_sharp():
    content, metadata = DisplayFormatter().format(plots.bars({"a": 1.0}, "images", "Bars"))
    width, height = Image.open(io.BytesIO(base64.b64decode(content["image/png"]))).size
    assert (width // 2, height // 2) == (metadata["image/png"]["width"], metadata["image/png"]["height"])


def test_class_balance_draws_every_split():
    for names in (["dark", "light"], MANY):
        (axes,) = balance(names).axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "validation", "test"]


def test_steps_over_time_draws_every_process():
    (axes,) = plots.steps_over_time(ENTRIES, 2).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"process {n}" for n in range(1, 7)]


def test_name_classes_writes_few_and_short_names():
    names = [text.get_text() for text in balance(LONG).axes[0].get_xticklabels()]
    assert len(names) == 25 and len(set(names)) > 20, "names that differ at their end should still differ"
    assert max(map(len, names)) <= 14
    assert len(balance(MANY).axes[0].get_xticklabels()) <= 30


def test_drawable_keeps_dollars():
    figure, _ = plots.subplots()
    (text,) = plots.drawable(["$a$"])
    drawn, plain = figure.text(0, 0, text), figure.text(0, 0, "$a$", parse_math=False)
    assert drawn.get_window_extent().width == plain.get_window_extent().width
    plt.close(figure)


@pytest.mark.parametrize("fonts", [["STIXGeneral.ttf"]], indirect=True)
def test_drawable_finds_a_font(fonts, capsys):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        DisplayFormatter().format(balance(["\u1d81", "\u1d8d"]))
    assert plt.rcParams["font.family"][-1] == "STIXGeneral"
    assert not warned and not capsys.readouterr().out


@pytest.mark.parametrize("fonts", [[], ["cmsy10.ttf"]], indirect=True)
def test_drawable_hints_at_a_missing_font(fonts, capsys):
    before = list(plt.rcParams["font.family"])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        DisplayFormatter().format(balance(["猫", "狗"]))
        DisplayFormatter().format(balance(["鳥", "魚"]))
    assert capsys.readouterr().out.count("No font on this machine") == 1
    assert not warned, "matplotlib warns per glyph and drawing"
    assert plt.rcParams["font.family"] == before
