"""Every picture the lessons draw. Each function takes plain arrays and returns a matplotlib figure with alt text."""

import base64
import functools
import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2a6fdb", "#e07b27", "#2f9e62", "#8a8f98"


class Picture(Figure):
    """A figure that a notebook shows with its alt text `alt`, and sharp on a screen with twice the usual pixels."""

    alt = ""

    def _repr_mimebundle_(self, **_):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
        png = buffer.getvalue()
        width, height = (int.from_bytes(png[start : start + 4], "big") // 2 for start in (16, 20))  # PNG's header
        size = {"width": width, "height": height}
        content = {"image/png": base64.b64encode(png).decode(), "text/plain": self.alt}
        return content, {"image/png": {"alt": self.alt, **size}}


_subplots = functools.partial(plt.subplots, FigureClass=Picture)


def show_pictures(images: np.ndarray, captions: list[str], columns: int = 8, title: str = "") -> Picture:
    """Draw pictures in a grid, each with its caption above.

    Args:
        images: uint8 (count, height, width, 3).
        captions: a short text a picture.
        columns: pictures a row.
        title: stands above the grid.
    """
    rows = max(1, -(-len(images) // columns))
    figure, axes = _subplots(rows, columns, figsize=(1.15 * columns, 1.4 * rows + 0.3), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image)
        axis.set_title(caption, fontsize=8 if max(map(len, caption.splitlines())) <= 14 else 6)
    named = ", ".join(" ".join(caption.split()) for caption in captions[:8]) + (" …" if len(captions) > 8 else "")
    return _finish(figure, title, f"{len(images)} pictures in a grid: {named}")


def class_balance(counts: dict[str, list[int]], class_names: list[str]) -> Picture:
    """Draw how many pictures of each class every split has; `counts` is `{split: [count of class 0, …]}`."""
    figure, axis = _subplots(figsize=(8, 2.8))
    width = 0.8 / len(counts)
    for place, (split, values) in enumerate(counts.items()):
        axis.bar(
            np.arange(len(class_names)) + place * width,
            values,
            width,
            label=split,
            color=(BLUE, ORANGE)[place],
        )
    _name_classes(axis.xaxis, class_names, np.arange(len(class_names)) + 0.4 - width / 2)
    axis.set_ylabel("pictures")
    axis.margins(y=0.25)
    axis.legend(frameon=False, ncols=2, loc="upper right")
    ranges = ", ".join(f"{split} {min(values)} to {max(values)}" for split, values in counts.items())
    return _finish(figure, "Pictures in each class", f"Bars for {len(class_names)} classes, pictures a class: {ranges}")


def bars(values: dict[str, float], unit: str, title: str) -> Picture:
    """Draw one horizontal bar a name, with its figure beside it."""
    figure, axis = _subplots(figsize=(8, 0.55 * len(values) + 0.9))
    drawn = axis.barh(list(values), list(values.values()), color=BLUE)
    axis.bar_label(drawn, labels=[f" {value:,.0f}" for value in values.values()])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(unit)
    return _finish(
        figure, title, f"Bars, {unit}: " + ", ".join(f"{name} {value:,.0f}" for name, value in values.items())
    )


def timeline(spans: list[tuple[str, float, float, str]], title: str) -> Picture:
    """Draw what ran when.

    Args:
        spans: (lane, start, end, kind) each, in seconds; one lane a process, one colour a kind.
        title: stands above.
    """
    lanes = list(dict.fromkeys(lane for lane, *_ in spans))
    kinds = list(dict.fromkeys(kind for *_, kind in spans))
    colours = dict(zip(kinds, (BLUE, ORANGE, GREEN, GREY), strict=False))
    first = min(start for _, start, _, _ in spans)
    figure, axis = _subplots(figsize=(8, 0.5 * len(lanes) + 1.6))
    for lane, start, end, kind in spans:
        axis.barh(
            lanes.index(lane),
            end - start,
            left=start - first,
            height=0.6,
            color=colours[kind],
            edgecolor="white",
        )
    axis.set_yticks(range(len(lanes)), lanes)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in kinds]
    axis.legend(
        handles,
        kinds,
        frameon=False,
        ncols=len(kinds),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    started = {kind: min(start for _, start, _, other in spans if other == kind) - first for kind in kinds}
    begins = ", ".join(f"{kind} from {second:.1f} s on" for kind, second in started.items())
    return _finish(figure, title, f"What ran when, in {len(lanes)} processes: {begins}")


def learning_curves(history: list[dict]) -> Picture:
    """Draw loss and accuracy on both splits against the epoch, from the dicts that the train loop returns."""
    epochs = [metrics["epoch"] + 1 for metrics in history]
    figure, axes = _subplots(1, 2, figsize=(9, 3))
    for axis, kind in zip(axes, ("loss", "accuracy"), strict=True):
        for split, colour in (("train", BLUE), ("test", ORANGE)):
            axis.plot(
                epochs,
                [metrics[f"{split}_{kind}"] for metrics in history],
                "o-",
                color=colour,
                label=split,
            )
        axis.set_xlabel("epoch")
        axis.set_ylabel(kind)
        axis.set_xticks(epochs if len(epochs) <= 12 else epochs[:: len(epochs) // 10])
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1.02)
    axes[1].legend(frameon=False, loc="lower right")
    first, last = history[0], history[-1]
    change = ", ".join(
        f"{name.replace('_', ' ')} from {first[name]:.2f} to {last[name]:.2f}"
        for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    )
    return _finish(figure, "Learning curves", f"Loss and accuracy against the epoch, over {len(history)}: {change}")


def confusion_matrix(counts: np.ndarray, class_names: list[str]) -> Picture:
    """Draw how often each true class (row) was given each answer (column); `counts` is (classes, classes)."""
    size = min(12.0, max(4.0, 0.45 * len(class_names) + 1.5))
    figure, axis = _subplots(figsize=(size + 0.6, size))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _name_classes(axis.xaxis, class_names, np.arange(len(class_names)))
    _name_classes(axis.yaxis, class_names, np.arange(len(class_names)))
    axis.set_xlabel("answer")
    axis.set_ylabel("true class")
    if len(class_names) <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = shares[row, column] > 0.5
            axis.text(
                column,
                row,
                counts[row, column],
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    right = f"{int(counts.trace())} of {int(counts.sum())} answers lie on the diagonal, where they are right"
    return _finish(figure, "Answers against true classes", f"A matrix of true classes against answers: {right}")


def steps_over_time(pages: list[dict], steps_per_epoch: int) -> Picture:
    """Draw which process took which training step when; a cross marks a process that died.

    Args:
        pages: one dict a step with `time` in seconds, `process` id and `step`, in the order of time.
        steps_per_epoch: dotted lines mark the ends of epochs, where checkpoints are.
    """
    figure, axis = _subplots(figsize=(8, 3.2))
    processes = list(dict.fromkeys(page["process"] for page in pages))
    for place, (process, colour) in enumerate(zip(processes, (BLUE, ORANGE, GREEN, GREY), strict=False)):
        mine = [page for page in pages if page["process"] == process]
        seconds = [page["time"] - pages[0]["time"] for page in mine]
        steps = [page["step"] for page in mine]
        axis.plot(seconds, steps, ".-", color=colour, label=f"process {place + 1}")
        if process != processes[-1]:
            axis.plot(seconds[-1], steps[-1], "x", color=colour, markersize=12, markeredgewidth=3)
    for epoch in range(1, max(page["step"] for page in pages) // steps_per_epoch + 1):
        axis.axhline(epoch * steps_per_epoch, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xlabel("seconds since the first step")
    axis.set_ylabel("training step")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    lives = ", then ".join(
        f"{steps[0]} to {steps[-1]}"
        for steps in ([page["step"] for page in pages if page["process"] == process] for process in processes)
    )
    title = "Steps taken; × a worker dies, dotted: a checkpoint"
    return _finish(figure, title, f"A line a process: steps {lives}")


def memory_while_streaming(read: list[float], held: list[float], most: float) -> Picture:
    """Draw what the object stores hold while more and more goes through them; all in MB.

    Args:
        read: how much has been read at each sample.
        held: what lies in the object stores at each sample.
        most: what they can hold.
    """
    figure, axis = _subplots(figsize=(8, 3))
    axis.plot(read, read, "--", color=GREY, label="if all that was read were kept")
    axis.axhline(most, color=ORANGE, linewidth=1, label="what the object stores can hold")
    axis.plot(read, held, color=BLUE, label="what they hold")
    axis.set_xlabel("MB of pictures read so far")
    axis.set_ylabel("MB")
    axis.legend(frameon=False)
    alt = f"{read[-1]:,.0f} MB go through; the object stores hold {max(held):,.0f} MB at most, of {most:,.0f} MB"
    return _finish(figure, "Memory while streaming", alt)


def trials_over_epochs(trials: list[dict], num_epochs: int) -> Picture:
    """Draw each trial's validation accuracy against the epoch; a cross marks a trial that was stopped early.

    Args:
        trials: one dict a trial with `label`, `accuracy`, a value an epoch, and `stopped`.
        num_epochs: how many epochs a trial has when nobody stops it.
    """
    figure, axis = _subplots(figsize=(8, 3.6))
    for place, trial in enumerate(trials):
        colour = (BLUE, ORANGE, GREEN, GREY)[place % 4]
        epochs = range(1, len(trial["accuracy"]) + 1)
        axis.plot(epochs, trial["accuracy"], ("o-", "s--")[place // 4 % 2], color=colour, label=trial["label"])
        if trial["stopped"]:
            # Smaller and smaller, so that none hides another where several were stopped at about the same place.
            axis.plot(epochs[-1], trial["accuracy"][-1], "x", color=colour, markersize=20 - 3 * (place % 4), mew=2)
    axis.set_xlim(0.8, num_epochs + 0.2)
    axis.set_xticks(range(1, num_epochs + 1, max(1, num_epochs // 10)))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ends = ", ".join(f"{trial['label']}: {trial['accuracy'][-1]:.2f}" for trial in trials)
    return _finish(figure, "One line a trial; × stopped early", f"Last validation accuracies: {ends}")


def _name_classes(axis, class_names: list[str], places: np.ndarray) -> None:
    """Write class names along an axis: shortened, turned where they are long, and not all when there are many."""
    step = -(-len(class_names) // 30)
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in class_names[::step]]
    turn = {"rotation": 45, "ha": "right"} if axis.axis_name == "x" and max(map(len, names)) > 5 else {}
    axis.set_ticks(places[::step], names, **turn)


def _finish(figure: Picture, title: str, alt: str) -> Picture:
    figure.alt = f"{title}. {alt}." if title else f"{alt}."
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    plt.close(figure)  # the cell shows the figure that it returns; without this it would be shown twice
    return figure
