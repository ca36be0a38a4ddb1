"""The images that every measured program reads: the same noise in CIFAR-10's shape for all."""

import os

import numpy as np
from PIL import Image

CLASSES = [f"class-{n}" for n in range(10)]


def noise(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (count, 32, 32, 3) and int64 (count,); a step takes as long as with real images."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count)


def smooth(count: int, seed: int = 0) -> np.ndarray:
    """Return uint8 (count, 32, 32, 3) of soft colours, which JPEG packs to about the size of a photograph's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in coarse])


def write_jpegs(folder: str, train: int, test: int) -> None:
    """Write `train` and `test` images as `<split>/<class>/<n>.jpg`."""
    for split, count in (("train", train), ("test", test)):
        for index, image in enumerate(smooth(count)):
            place = os.path.join(folder, split, CLASSES[index % 10])
            os.makedirs(place, exist_ok=True)
            Image.fromarray(image).save(os.path.join(place, f"{index:06d}.jpg"))
