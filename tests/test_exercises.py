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
    ],
)
def test_messages(message, says):
    assert says in message


def test_references_are_told_from_results():
    references = [ray.put(1) for _ in range(4)]
    assert "pass the list to ray.get()" in exercises.check_worker_ids(references)
