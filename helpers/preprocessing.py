"""Pictures into what the network eats: augmentation and normalisation, a batch at a time."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # Ray Data's processes import this module and do without torch, which takes seconds to import
    import torch


def augment_batch(batch: dict[str, np.ndarray], flip: bool, shift: int = 2) -> dict[str, np.ndarray]:
    """Shift each picture by up to `shift` pixels and, if `flip`, mirror about half of them.

    The random generator is new and unseeded in each call, so that every epoch sees other variants.

    Args:
        batch: `image`, uint8 (batch, height, width, 3); the other columns pass through.
        flip: mirror left and right; only where a mirrored picture still belongs to its class.
        shift: the largest shift in pixels; what moves in from outside is black.

    Returns:
        The batch with the same shapes and dtypes.
    """
    rng = np.random.default_rng()
    images = batch["image"]
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    top = rng.integers(0, 2 * shift + 1, size=(count, 1, 1))
    left = rng.integers(0, 2 * shift + 1, size=(count, 1, 1))
    rows = top + np.arange(height)[None, :, None]
    columns = left + np.arange(width)[None, None, :]
    if flip:
        mirrored = rng.random((count, 1, 1)) < 0.5
        columns = np.where(mirrored, columns[:, :, ::-1], columns)
    return {**batch, "image": padded[np.arange(count)[:, None, None], rows, columns]}


def normalize_images(images: "torch.Tensor", mean: list[float], std: list[float]) -> "torch.Tensor":
    """Turn stored pictures into the network's input, on whatever device they lie.

    Args:
        images: uint8 (batch, height, width, 3), values 0 to 255.
        mean: the mean of each of the 3 channels on the scale 0 to 1.
        std: the standard deviation of each channel on the same scale.

    Returns:
        float32 (batch, 3, height, width), contiguous; equal to torchvision's `ToTensor` followed by `Normalize`.
    """
    scaled = images.permute(0, 3, 1, 2).contiguous().float().div_(255)
    shape = (1, 3, 1, 1)
    return scaled.sub_(scaled.new_tensor(mean).view(shape)).div_(scaled.new_tensor(std).view(shape))


def channel_sums(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sum a batch's pixels and their squares for each channel: one row from a whole batch, exact integers.

    Args:
        batch: `image`, uint8 (batch, height, width, 3).

    Returns:
        `pixels` int64 (1,), `total` and `squares` int64 (1, 3).
    """
    values = batch["image"].reshape(-1, 3).astype(np.int64)
    return {
        "pixels": np.array([len(values)]),
        "total": values.sum(axis=0, keepdims=True),
        "squares": (values**2).sum(axis=0, keepdims=True),
    }


def channel_statistics(dataset) -> tuple[list[float], list[float]]:
    """Compute each channel's mean and standard deviation with Ray Data, in one pass.

    Args:
        dataset: a `ray.data.Dataset` with a column `image`, uint8 (height, width, 3).

    Returns:
        mean and std, 3 floats each, on the scale 0 to 1. A channel without any variation gets std 1, so that
        normalising by it stays finite.
    """
    rows = dataset.map_batches(channel_sums, batch_size=1024).take_all()
    pixels = sum(int(row["pixels"]) for row in rows)
    mean = sum(row["total"] for row in rows) / pixels
    variance = sum(row["squares"] for row in rows) / pixels - mean**2
    std = np.sqrt(np.maximum(variance, 0)) / 255
    return (mean / 255).tolist(), np.where(std > 0, std, 1.0).tolist()
