"""The checks of a reader's answers: each returns one line that says what is off, or that it is right."""

import numpy as np

NOT_DONE = "Not done yet: replace the … with your answer and run the cell again."


def check_worker_ids(answer) -> str:
    """Lesson 00: the process ids that four Ray tasks returned."""
    if answer is ...:
        return NOT_DONE
    if not isinstance(answer, list):
        return f"Expected a list of four process ids and got {type(answer).__name__}: collect them with ray.get([...])."
    if any(type(item).__name__ == "ObjectRef" for item in answer):
        return "These are references to results that may not exist yet: pass the list to ray.get() to wait for them."
    if len(answer) != 4:
        return f"Expected four process ids and got {len(answer)}: call the remote function four times."
    import os

    if os.getpid() in answer:
        return "One of these ids is this notebook's own: call the function with .remote(), so that a worker runs it."
    return f"Right: {len(set(answer))} worker process(es) ran your four tasks, and none of them is this notebook."


def check_brightness(answer, batches, num_classes: int) -> str:
    """Lesson 01: the mean brightness, 0 to 255, of each class; `batches` are dicts with `image` and `label`."""
    if answer is ...:
        return NOT_DONE
    total, count = np.zeros(num_classes), np.zeros(num_classes)
    for batch in batches:
        np.add.at(total, batch["label"], batch["image"].mean(axis=(1, 2, 3)))
        np.add.at(count, batch["label"], 1)
    expected = total / np.maximum(count, 1)
    values = np.asarray(answer, dtype=float)
    if values.shape != expected.shape:
        return f"Expected one number a class, {len(expected)} in all, and got an array of shape {values.shape}."
    if np.allclose(values * 255, expected, rtol=1e-3):
        return "These are on the scale 0 to 1; the pictures are stored as 0 to 255: leave out the division by 255."
    if not np.allclose(values, expected, rtol=1e-3):
        worst = int(np.abs(values - expected).argmax())
        return (
            f"Class {worst} should have {expected[worst]:.2f} and has {values[worst]:.2f}: "
            "average over that class's pictures only."
        )
    return "Right: the mean brightness of every class agrees."


def check_batch_function(answer, batch: dict) -> str:
    """Lesson 02: a function that turns a batch's pictures grey, still uint8 with three equal channels."""
    if answer is ...:
        return NOT_DONE
    result = answer({name: column.copy() for name, column in batch.items()})
    if not isinstance(result, dict) or "image" not in result:
        return "The function must return a dict with the column `image`: did you forget the return?"
    if "label" not in result:
        return "The column `label` got lost: return {**batch, 'image': grey} to pass the other columns on."
    grey = np.asarray(result["image"])
    if grey.shape != batch["image"].shape:
        return (
            f"The shape should stay {batch['image'].shape} and became {grey.shape}: repeat the grey value three times."
        )
    if grey.dtype != np.uint8:
        return f"The dtype should stay uint8 and became {grey.dtype}: convert with .astype(np.uint8) at the end."
    expected = batch["image"].mean(axis=-1, keepdims=True)
    if np.abs(grey - expected).max() > 1:
        return "The pictures are not grey: each channel should hold the mean of the three, axis=-1."
    return "Right: grey pictures, same shape, same dtype, labels kept."


def check_per_worker_batch(answer) -> str:
    """Lesson 03: the per-worker batch and the steps an epoch for 512 pictures, a global batch of 64 and 4 workers."""
    if answer is ... or ... in answer:
        return NOT_DONE
    batch, steps = answer
    if batch == 64:
        return "64 is the global batch: the four workers share it."
    if batch != 16:
        return f"Each of 4 workers takes 64 / 4 pictures a step, not {batch}."
    if steps == 32:
        return "32 would be one worker's steps if it saw all 512 pictures; it sees only its shard of 128."
    if steps != 8:
        return f"A shard has 512 / 4 pictures and a step takes 16 of them; that is not {steps} steps."
    return "Right: 16 pictures a worker and step, 8 steps an epoch: the same 8 updates as one worker would make."


def check_scaling_config(answer) -> str:
    """Lesson 04: a ScalingConfig for 4 workers with a GPU and 3 CPUs each."""
    if answer is ...:
        return NOT_DONE
    if type(answer).__name__ != "ScalingConfig":
        return f"Expected a ScalingConfig and got {type(answer).__name__}."
    if answer.num_workers != 4:
        return f"num_workers should be 4 and is {answer.num_workers}."
    if not answer.use_gpu:
        return "Without use_gpu=True the workers would train on processors."
    cpus = (answer.resources_per_worker or {}).get("CPU")
    if cpus != 3:
        return (
            f"Each worker should ask for 3 CPUs and asks for {cpus}: "
            "resources_per_worker={'CPU': 3}; note the capitals."
        )
    return f"Right: in all {answer.total_resources}."


def check_per_class_accuracy(answer, confusion: np.ndarray) -> str:
    """Lesson 05: each class's accuracy from the confusion matrix, (classes, classes), true classes in rows."""
    if answer is ...:
        return NOT_DONE
    values = np.asarray(answer, dtype=float)
    expected = np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1)
    if values.shape != expected.shape:
        return f"Expected one number a class, {len(expected)} in all, and got an array of shape {values.shape}."
    precision = np.diag(confusion) / np.maximum(confusion.sum(axis=0), 1)
    if np.allclose(values, expected):
        return f"Right: the hardest class is number {int(expected.argmin())} with {expected.min():.1%}."
    if np.allclose(values, precision):
        return (
            "You divided by the columns: that is precision, the share of an answer that was true. Divide by the rows."
        )
    if np.allclose(values, np.diag(confusion)):
        return "These are counts: divide each by the number of pictures that the class has."
    return f"Class 0 should have {expected[0]:.3f} and has {values[0]:.3f}: diagonal divided by the sum of the row."


def check_steps_lost(answer, pages: list[dict]) -> str:
    """Lesson 06: how many steps were taken more than once because workers were killed."""
    if answer is ...:
        return NOT_DONE
    steps = [page["step"] for page in pages]
    lost = len(steps) - len(set(steps))
    if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
        return f"Expected a whole number of steps and got {type(answer).__name__}."
    if answer == len(steps):
        return "That is how many steps were taken in all: subtract those that were needed."
    if answer == len(set(steps)):
        return "That is how many steps were needed: subtract them from those that were taken."
    if answer != lost:
        return f"Not {answer}: compare the number of pages with the number of different steps on them."
    return f"Right: {lost} of {len(steps)} steps were done again, because no checkpoint held them."


def check_efficiency(answer, rates: dict[int, float]) -> str:
    """Lesson 07: the speed-up of the largest number of workers, divided by it; `rates` is pictures/s by workers."""
    if answer is ...:
        return NOT_DONE
    most = max(rates)
    if isinstance(answer, bool) or not isinstance(answer, (int, float, np.number)):
        return f"Expected one number and got {type(answer).__name__}."
    speed_up = rates[most] / rates[1]
    if np.isclose(answer, 1 / speed_up) or np.isclose(answer, 1 / (speed_up / most)):
        return "That is upside down: divide the throughput of many workers by that of one."
    if np.isclose(answer, speed_up) and most > 1:
        return f"That is the speed-up: divide it by the {most} workers that it took."
    if not np.isclose(answer, speed_up / most):
        return f"Not {answer:.3f}: divide the two throughputs, then divide by the number of workers."
    return f"Right: {most} workers run at {answer:.0%} of what {most} independent machines would give."


def check_surer_half(answer, answers: dict) -> str:
    """Lesson 08: the accuracy, 0 to 1, where the confidence is at least the median; `answers` are arrays (count,)."""
    if answer is ...:
        return NOT_DONE
    if np.ndim(answer) != 0:
        return f"Expected one number and got an array of shape {np.shape(answer)}: take the mean."
    if isinstance(answer, bool) or not isinstance(answer, (int, float, np.number)):
        return f"Expected one number and got {type(answer).__name__}."
    right = answers["predicted"] == answers["label"]
    sure = answers["confidence"] >= np.median(answers["confidence"])
    value, expected = float(answer), right[sure].mean()
    if np.isclose(value, expected):
        return (
            f"Right: {expected:.1%} where it is surer, against {right.mean():.1%} on all. "
            f"{np.sum(right[sure] == 0)} of its {np.sum(right == 0)} mistakes would pass unseen."
        )
    if np.isclose(value, right.mean()):
        return "That is the accuracy on all pictures: keep those with a confidence of at least the median."
    if np.isclose(value, right[~sure].mean() if (~sure).any() else -1):
        return "That is the less sure half: take the pictures whose confidence is at least the median, not below it."
    if np.isclose(value, right[sure].sum()):
        return "That is how many it got right: divide by the number of pictures of the surer half."
    if np.isclose(value, right[sure].sum() / len(right)):
        return "You divided by all pictures: divide by those of the surer half alone."
    return f"Expected {expected:.4f} and got {value:.4f}: right answers among the surer pictures, as a share of these."


def check_epochs_saved(answer, trials: list[dict], num_epochs: int) -> str:
    """Lesson 09: the epochs that stopping early spared; `trials` have a list `accuracy` with a value an epoch."""
    if answer is ...:
        return NOT_DONE
    if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
        return f"Expected a whole number of epochs and got {type(answer).__name__}."
    trained = sum(len(trial["accuracy"]) for trial in trials)
    planned = len(trials) * num_epochs
    saved = planned - trained
    if answer == saved:
        return f"Right: {trained} of {planned} epochs were reported, {saved / planned:.0%} were spared."
    if answer == trained:
        return "That is how many epochs the trials reported: subtract them from those that were planned."
    if answer == planned:
        return "That is how many epochs were planned for all trials: subtract those that they reported."
    if answer == sum(len(trial["accuracy"]) < num_epochs for trial in trials):
        return "That is how many trials were stopped: count the epochs that each of them still had before it."
    return f"Not {answer}: planned are {num_epochs} epochs a trial; subtract the lengths of the lists `accuracy`."
