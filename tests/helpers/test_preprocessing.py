"""Normalisation equals torchvision's; statistics equal NumPy's; augmentation varies images and nothing else."""

import numpy as np
import pytest
import ray
import torch
from torchvision import transforms

from helpers.data import to_table
from helpers.preprocessing import augment_batch, channel_statistics, image_ids, normalize_images


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)


def test_normalize_images_equals_to_tensor_and_normalize(images):
    mean, std = [0.1, 0.5, 0.7], [0.2, 0.3, 0.4]
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([reference(image) for image in images])
    ours = normalize_images(torch.from_numpy(images), mean, std)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert ours.is_contiguous(), "DDP complains about strides otherwise"


def test_normalize_images_leaves_its_input_alone(images):
    before = images.copy()
    normalize_images(torch.from_numpy(images), [0.5] * 3, [0.5] * 3)
    assert np.array_equal(images, before)


def test_channel_statistics_over_many_blocks_equal_numpys(shared_ray, images):
    tables = [to_table(part, np.zeros(len(part)), ["a"]) for part in np.array_split(images, 7)]
    mean, std = channel_statistics(ray.data.from_arrow(tables), batch_size=7)  # or one call would take all blocks
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-9)


def test_channel_statistics_without_variation_stay_finite(shared_ray):
    flat = np.full((4, 32, 32, 3), 7, np.uint8)
    _, std = channel_statistics(ray.data.from_arrow(to_table(flat, np.zeros(4), ["a"])))
    assert std == [1.0, 1.0, 1.0]


def test_augment_batch_keeps_labels_shape_and_dtype(images):
    labels = np.arange(50)
    result = augment_batch({"image": images, "label": labels}, flip=True)
    assert result["image"].shape == images.shape and result["image"].dtype == np.uint8
    assert np.array_equal(result["label"], labels)


def test_augment_batch_shifts_each_image_by_itself(images):
    shift = 2  # of 32 pixels
    result = augment_batch({"image": images}, flip=False)["image"]
    padded = np.pad(images, ((0, 0), (shift,) * 2, (shift,) * 2, (0, 0)))
    places = set()
    for index, variant in enumerate(result):
        found = [
            (top, left)
            for top in range(2 * shift + 1)
            for left in range(2 * shift + 1)
            if np.array_equal(padded[index, top : top + 32, left : left + 32], variant)
        ]
        assert found, f"variant {index} is not a shift of its image"
        places.add(found[0])
    assert len(places) > 10, "the shifts do not vary"


def test_augment_batch_mirrors_only_where_it_is_allowed(images):
    images = images[:, :8, :8]  # too small to be shifted
    kept = augment_batch({"image": images}, flip=False)["image"]
    assert np.array_equal(kept, images)
    mirrored = augment_batch({"image": images}, flip=True)["image"]
    same = (mirrored == images).all(axis=(1, 2, 3))
    turned = (mirrored == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ turned).all() and 5 < turned.sum() < 45


def test_augment_batch_differs_from_pass_to_pass(images):
    first, second = (augment_batch({"image": images}, flip=True)["image"] for _ in range(2))
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.5


def test_image_ids_depend_on_the_pixels_alone(images):
    copies = np.concatenate([images, images[::-1]])
    ids = image_ids(copies)
    assert ids.dtype == np.int64 and ids.shape == (100,)
    assert len(set(ids.tolist())) == 50 and list(ids[:50]) == list(ids[50:][::-1])
    changed = images[:1].copy()
    changed[0, 0, 0, 0] ^= 1
    assert image_ids(changed)[0] not in ids
