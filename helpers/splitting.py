"""Pictures to choose by: a validation split drawn by lot from the training pictures.

A room of its own because Ray Data's processes import it, and start seconds sooner without PyTorch.
"""

import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import ray.data


def hash_fraction(images: np.ndarray, seed: int) -> np.ndarray:
    """Return a number from 0 to just below 1 for each picture, which depends on its pixels and `seed` alone.

    Args:
        images: uint8 (count, height, width, 3).
        seed: another seed gives unrelated numbers.

    Returns:
        float64 (count,).
    """
    key = str(seed).encode()
    digests = [hashlib.blake2b(image.tobytes(), digest_size=6, key=key).digest() for image in images]
    return np.array([int.from_bytes(digest, "big") / 2**48 for digest in digests])


def pick(batch: dict[str, np.ndarray], low: float, high: float, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of `batch` whose pictures hash to a fraction from `low` to just below `high`."""
    fractions = hash_fraction(batch["image"], seed)
    mine = (low <= fractions) & (fractions < high)
    return {name: column[mine] for name, column in batch.items()}


def train_validation_split(train_ds: "ray.data.Dataset", pictures: int, seed: int) -> list["ray.data.Dataset"]:
    """Draw about `pictures` of the training pictures by lot, and hold a third of those out for validation.

    Equal pictures hash to equal fractions, so that none is on both sides, and the order of the rows plays no part.

    Args:
        train_ds: the training split, with a column `image`, uint8 (height, width, 3).
        pictures: how many to draw; all of them when there are no more.
        seed: another seed draws others.

    Returns:
        The pictures to train on and those to validate with, both in memory.

    Raises:
        ValueError: there are too few pictures for both.
    """
    share = min(1, pictures / train_ds.count())
    training = functools.partial(pick, low=share / 3, high=share, seed=seed)
    validation = functools.partial(pick, low=0, high=share / 3, seed=seed)
    parts = [train_ds.map_batches(part, batch_size=None).materialize() for part in (training, validation)]
    if not all(part.count() for part in parts):
        raise ValueError(f"{train_ds.count()} training pictures are too few to hold some of them out.")
    return parts
