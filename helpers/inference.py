"""A checkpoint at work: over a whole data set in a pool of actors, and for one picture at a time in a single one."""

import os
import zlib

import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train
import torch
from ray.data import ActorPoolStrategy, SaveMode

from helpers import evaluation
from helpers.preprocessing import normalize_images


class Classifier:
    """The trained network in a process of its own: loaded once, then asked batch after batch.

    Args:
        checkpoint: what the train loop of lesson 03 saved; the pictures are normalised as its `config` says.
    """

    def __init__(self, checkpoint: ray.train.Checkpoint):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.config = evaluation.load_model(checkpoint)
        self.model.to(self.device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer a batch.

        Args:
            batch: `image`, uint8 (batch, height, width, 3), and any other columns.

        Returns:
            The other columns as they came, `predicted` int64 (batch,), the class's number, and `confidence` float32
            (batch,), the probability that the network gives it, 0 to 1. The pictures are left out.
        """
        images = torch.tensor(batch["image"], device=self.device)
        logits = self.model(normalize_images(images, self.config["mean"], self.config["std"]))
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        others = {name: column for name, column in batch.items() if name != "image"}
        return {**others, "predicted": predicted.cpu().numpy(), "confidence": confidence.cpu().numpy()}


def add_fingerprint(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the column `picture`, int64 (batch,): a number computed from the pixels, to know each picture again by."""
    fingerprints = [zlib.crc32(image.tobytes()) for image in batch["image"]]
    return {**batch, "picture": np.array(fingerprints, dtype=np.int64)}


def write_predictions(
    dataset: ray.data.Dataset, checkpoint: ray.train.Checkpoint, folder: str, size: int, resources: dict
) -> None:
    """Answer every picture of `dataset` and write the answers as Parquet; what lay in `folder` before is replaced.

    Args:
        dataset: columns `image` and `label`.
        checkpoint: the trained network.
        folder: a path or URI; it gets `label`, `picture`, `predicted` and `confidence`, in no particular order.
        size: the number of actors that answer side by side.
        resources: what each of them gets, as `cluster.actor_pool` gives it.
    """
    predictions = dataset.map_batches(add_fingerprint, batch_size=None).map_batches(
        Classifier,
        fn_constructor_args=[checkpoint],
        batch_size=256,
        compute=ActorPoolStrategy(size=size),
        **resources,
    )
    predictions.write_parquet(folder, mode=SaveMode.OVERWRITE)


def read_predictions(folder: str) -> dict[str, np.ndarray]:
    """Return the columns that `write_predictions` wrote to `folder`, a path or URI, as arrays (count,)."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    table = pq.read_table(path, filesystem=filesystem)
    return {name: table[name].to_numpy() for name in table.column_names}


def check_picture(picture: np.ndarray) -> None:
    """Raise when `picture` is not what the network was trained on: a uint8 array (32, 32, 3).

    Raises:
        ValueError: one sentence that says what is wrong and what to do.
    """
    if not isinstance(picture, np.ndarray):
        kind = type(picture).__name__
        raise ValueError(f"A picture must be a NumPy array and this is a {kind}: read or convert it first.")
    if picture.shape == (3, 32, 32):
        raise ValueError("The shape is (3, 32, 32), channels first: put them last with picture.transpose(1, 2, 0).")
    if picture.shape != (32, 32, 3):
        raise ValueError(f"The shape must be (32, 32, 3) and is {picture.shape}: resize the picture, in RGB.")
    if picture.dtype != np.uint8:
        raise ValueError(f"The dtype must be uint8, 0 to 255, and is {picture.dtype}: scale if need be, then convert.")


class PictureService(Classifier):
    """A classifier that answers one picture at a time and refuses bad ones; to be a Ray actor."""

    def answer(self, picture: np.ndarray) -> dict:
        """Return the picture's `class`, the network's `confidence`, 0 to 1, and the `process` that answered.

        Raises:
            ValueError: the picture is not a uint8 array (32, 32, 3).
        """
        check_picture(picture)
        answers = self({"image": picture[np.newaxis]})
        return {
            "class": self.config["class_names"][answers["predicted"][0]],
            "confidence": float(answers["confidence"][0]),
            "process": os.getpid(),
        }


def ask(service, picture: np.ndarray) -> dict:
    """Send `picture` to an actor of `PictureService` and wait for the answer.

    Raises:
        ValueError: the actor refused the picture; the sentence says why.
        ray.exceptions.RayActorError: there is no such actor any more.
    """
    try:
        return ray.get(service.answer.remote(picture))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the actor's own sentence, without Ray's account of where it was raised
