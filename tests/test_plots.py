"""Every picture can be drawn, also from unusual data."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter

from helpers import plots

PICTURES = np.zeros((9, 32, 32, 3), np.uint8)
MANY = [f"a class with a long name {n}" for n in range(25)]
HISTORY = [
    {"epoch": n, "train_loss": 1 / (n + 1), "test_loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.6}
    for n in range(30)
]

TRIALS = [
    {"label": "learning rate 0.03", "accuracy": [0.5, 0.7, 0.8], "stopped": False},
    {"label": "learning rate 0.001", "accuracy": [0.1], "stopped": True},
]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.show_pictures(PICTURES, ["a"] * 9),
        lambda: plots.show_pictures(PICTURES[:0], []),
        lambda: plots.class_balance({"train": [3] * 25, "test": [1] * 25}, MANY),
        lambda: plots.bars({"map": 10.0, "map_batches": 1000.0}, "pictures a second", "Rates"),
        lambda: plots.timeline([("worker 1", 0, 1, "augment"), ("notebook", 0.5, 2, "train")], "What ran when"),
        lambda: plots.learning_curves(HISTORY),
        lambda: plots.learning_curves(HISTORY[:1]),
        lambda: plots.confusion_matrix(np.eye(2, dtype=int), ["dark", "light"]),
        lambda: plots.confusion_matrix(np.zeros((25, 25), dtype=int), MANY),
        lambda: plots.trials_over_epochs(TRIALS, 3),
        lambda: plots.trials_over_epochs([*TRIALS, *TRIALS, *TRIALS], 30),
    ],
)
def test_a_picture_is_drawn_and_shown_once(draw, tmp_path):
    figure = draw()
    figure.savefig(tmp_path / "picture.png")
    assert not plt.get_fignums(), "an open figure would be shown a second time"
    _, metadata = DisplayFormatter().format(figure)
    shown = metadata["image/png"]
    assert len(shown["alt"]) > 20 and shown["alt"].endswith("."), "no words for who can't see it"
    assert 0 < shown["width"] <= 1000
