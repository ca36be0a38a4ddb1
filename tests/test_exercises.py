"""Each check says "not done yet" to a stub, says what is off to a typical mistake, and accepts a right answer."""

import os

import numpy as np
import pytest
import ray
from ray.train import ScalingConfig

from helpers import exercises

RNG = np.random.default_rng(0)
BATCH = {"image": RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), "label": np.array([0, 1, 0, 1, 2, 2])}
BRIGHTNESS = np.array([BATCH["image"][BATCH["label"] == label].mean() for label in range(3)])
GREY = BATCH["image"].mean(axis=-1, keepdims=True)
CONFUSION = np.array([[8, 2], [1, 4]])
ANSWERS = {
    "label": np.zeros(10, int),
    "predicted": np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, 1]),  # four right of the surer five, one of the others
    "confidence": np.linspace(0.95, 0.1, 10),
}
PAGES = [{"step": step} for step in (1, 2, 1, 2, 3)]
RATES = {1: 100.0, 2: 150.0}
TRIALS = [{"accuracy": [0.5, 0.7, 0.8]}, {"accuracy": [0.1]}, {"accuracy": [0.5, 0.9, 0.9]}, {"accuracy": [0.2]}]


def brightness(answer):
    return exercises.check_brightness(answer, [BATCH], 3)


def grey(image):
    return exercises.check_batch_function(lambda batch: image, BATCH)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (exercises.check_worker_ids(...), "Not done yet"),
        (exercises.check_worker_ids(12), "Expected a list"),
        (exercises.check_worker_ids([1, 2]), "call the remote function four times"),
        (exercises.check_worker_ids([os.getpid()] * 4), "call the function with .remote"),
        (exercises.check_worker_ids([1, 2, 2, 3]), "Right: 3 worker"),
        (brightness(...), "Not done yet"),
        (brightness(BRIGHTNESS[:2]), "one number a class, 3 in all"),
        (brightness(BRIGHTNESS / 255), "scale 0 to 1"),
        (brightness(BRIGHTNESS + [0, 0, 9]), "Class 2 should have"),
        (brightness(BRIGHTNESS), "Right"),
        (exercises.check_batch_function(..., BATCH), "Not done yet"),
        (grey(None), "forget the return"),
        (grey({"image": GREY}), "`label` got lost"),
        (grey({**BATCH, "image": GREY}), "repeat the grey value three times"),
        (grey({**BATCH, "image": np.repeat(GREY, 3, -1)}), "dtype should stay uint8"),
        (grey(BATCH), "not grey"),
        (grey({**BATCH, "image": np.repeat(GREY, 3, -1).astype(np.uint8)}), "Right"),
        (exercises.check_per_worker_batch((..., 8)), "Not done yet"),
        (exercises.check_per_worker_batch((64, 8)), "64 is the global batch"),
        (exercises.check_per_worker_batch((16, 32)), "only its shard of 128"),
        (exercises.check_per_worker_batch((16, 8)), "Right"),
        (exercises.check_scaling_config(...), "Not done yet"),
        (exercises.check_scaling_config(4), "Expected a ScalingConfig"),
        (exercises.check_scaling_config(ScalingConfig(num_workers=2)), "should be 4 and is 2"),
        (exercises.check_scaling_config(ScalingConfig(num_workers=4)), "Without use_gpu"),
        (exercises.check_scaling_config(ScalingConfig(num_workers=4, use_gpu=True)), "asks for None"),
        (exercises.check_per_class_accuracy(..., CONFUSION), "Not done yet"),
        (exercises.check_per_class_accuracy([8 / 9, 4 / 6], CONFUSION), "divided by the columns"),
        (exercises.check_per_class_accuracy([8, 4], CONFUSION), "These are counts"),
        (exercises.check_per_class_accuracy([0.5, 0.5], CONFUSION), "Class 0 should have 0.800"),
        (exercises.check_per_class_accuracy([0.8, 0.8], CONFUSION), "Right"),
        (exercises.check_steps_lost(..., PAGES), "Not done yet"),
        (exercises.check_steps_lost([1, 2], PAGES), "Expected a whole number"),
        (exercises.check_steps_lost(5, PAGES), "subtract those that were needed"),
        (exercises.check_steps_lost(3, PAGES), "subtract them from those that were taken"),
        (exercises.check_steps_lost(1, PAGES), "Not 1"),
        (exercises.check_steps_lost(2, PAGES), "Right: 2 of 5"),
        (exercises.check_efficiency(..., RATES), "Not done yet"),
        (exercises.check_efficiency("1.5", RATES), "Expected one number"),
        (exercises.check_efficiency(1.5, RATES), "divide it by the 2 workers"),
        (exercises.check_efficiency(100 / 150, RATES), "upside down"),
        (exercises.check_efficiency(0.9, RATES), "Not 0.900"),
        (exercises.check_efficiency(0.75, RATES), "Right: 2 workers run at 75%"),
        (exercises.check_surer_half(..., ANSWERS), "Not done yet"),
        (exercises.check_surer_half(ANSWERS["confidence"] >= 0.5, ANSWERS), "array of shape (10,): take the mean"),
        (exercises.check_surer_half("80 %", ANSWERS), "Expected one number and got str"),
        (exercises.check_surer_half(0.5, ANSWERS), "accuracy on all pictures"),
        (exercises.check_surer_half(0.2, ANSWERS), "the less sure half"),
        (exercises.check_surer_half(4, ANSWERS), "divide by the number of pictures of the surer half"),
        (exercises.check_surer_half(0.4, ANSWERS), "You divided by all pictures"),
        (exercises.check_surer_half(80.0, ANSWERS), "Expected 0.8000 and got 80.0000"),
        (exercises.check_surer_half(np.float64(0.8), ANSWERS), "Right: 80.0% where it is surer"),
        (exercises.check_epochs_saved(..., TRIALS, 3), "Not done yet"),
        (exercises.check_epochs_saved(1.5, TRIALS, 3), "Expected a whole number of epochs and got float"),
        (exercises.check_epochs_saved(8, TRIALS, 3), "subtract them from those that were planned"),
        (exercises.check_epochs_saved(12, TRIALS, 3), "subtract those that they reported"),
        (exercises.check_epochs_saved(2, TRIALS, 3), "how many trials were stopped"),
        (exercises.check_epochs_saved(5, TRIALS, 3), "Not 5: planned are 3 epochs a trial"),
        (exercises.check_epochs_saved(4, TRIALS, 3), "Right: 8 of 12 epochs were reported, 33% were spared"),
    ],
)
def test_messages(message, says):
    assert says in message


def test_references_are_told_from_results():
    references = [ray.put(1) for _ in range(4)]
    assert "pass the list to ray.get()" in exercises.check_worker_ids(references)
