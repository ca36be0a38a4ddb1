"""Augmentation and normalisation, one batch at a time, and ids by which to recognise images."""

import hashlib

import numpy as np  # and not torch: Ray Data's processes import this module and start seconds sooner without it


def augment_batch(batch: dict[str, np.ndarray], flip: bool) -> dict[str, np.ndarray]:
    """Shift each image, uint8 (height, width, 3), by up to 1/16 of its height; if `flip`, mirror about half of them."""
    rng = np.random.default_rng()  # new and unseeded in each call, so every epoch sees different variants
    images = batch["image"]
    count, height, width, _ = images.shape
    shift = height // 16
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    corners = rng.integers(0, 2 * shift + 1, size=(count, 2))
    mirrored = rng.random(count) < 0.5
    augmented = np.empty_like(images)
    for index, (top, left) in enumerate(corners):
        window = padded[index, top : top + height, left : left + width]
        augmented[index] = window[:, ::-1] if flip and mirrored[index] else window
    return {**batch, "image": augmented}


def normalize_images(images, mean: list[float], std: list[float]):
    """Turn a uint8 tensor (batch, height, width, 3) into float32 (batch, 3, height, width); mean, std: scale 0 to 1."""
    # Equal to torchvision's `ToTensor` followed by `Normalize`, and contiguous, on whatever device the images are.
    scaled = images.permute(0, 3, 1, 2).contiguous().float().div_(255)
    return scaled.sub_(scaled.new_tensor(mean).view(1, 3, 1, 1)).div_(scaled.new_tensor(std).view(1, 3, 1, 1))


def image_ids(images: np.ndarray) -> np.ndarray:
    """Return int64 (count,), 8 bytes of the BLAKE2b hash of each image's pixels: equal images have equal ids."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def channel_sums(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sum the pixels of each channel and their squares: one row, `pixels` (1,), `total` and `squares` (1, 3), int64."""
    values = batch["image"].reshape(-1, 3).astype(np.int64)
    return {
        "pixels": np.array([len(values)]),
        "total": values.sum(axis=0, keepdims=True),
        "squares": (values**2).sum(axis=0, keepdims=True),
    }


def channel_statistics(dataset, batch_size: int = 1024) -> tuple[list[float], list[float]]:
    """Compute each channel's mean and standard deviation with Ray Data in one pass; 3 floats each, scale 0 to 1."""
    rows = dataset.map_batches(channel_sums, batch_size=batch_size).take_all()
    pixels = sum(int(row["pixels"]) for row in rows)
    mean = sum(row["total"] for row in rows) / pixels
    variance = sum(row["squares"] for row in rows) / pixels - mean**2
    std = np.sqrt(np.maximum(variance, 0)) / 255
    # A channel without any variation gets std 1, so that normalising by it stays finite.
    return (mean / 255).tolist(), np.where(std > 0, std, 1.0).tolist()
