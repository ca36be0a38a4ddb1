"""A trained checkpoint back in memory, what it answers for every test picture, and the record that is kept of it."""

import json
import os

import numpy as np
import pyarrow.fs
import ray.data
import ray.train
import torch

from helpers import settings
from helpers.model import build_model
from helpers.preprocessing import normalize_images


def load_model(checkpoint: ray.train.Checkpoint) -> tuple[torch.nn.Module, dict]:
    """Return the trained network, ready to answer, and the `train_loop_config` that it was trained with."""
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    model = build_model(state["config"]["num_classes"])
    model.load_state_dict(state["model"])
    return model.eval(), state["config"]


@torch.no_grad()
def predict(model: torch.nn.Module, config: dict, dataset: ray.data.Dataset) -> dict[str, np.ndarray]:
    """Return the network's answers for every picture of `dataset`.

    Returns:
        `image` uint8 (count, height, width, 3), `label` int64 (count,), and `probability` float32 (count, classes).
    """
    parts = {"image": [], "label": [], "probability": []}
    for batch in dataset.iter_torch_batches(batch_size=256):
        logits = model(normalize_images(batch["image"], config["mean"], config["std"]))
        parts["image"].append(batch["image"].numpy())
        parts["label"].append(batch["label"].numpy())
        parts["probability"].append(logits.softmax(dim=1).numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def save(result: ray.train.Result, accuracy: float, pictures: int, chosen: settings.Settings) -> None:
    """Keep a checkpoint's evaluation: beside the run, and as the latest of its data source."""
    record = {
        "accuracy": accuracy,
        "pictures": pictures,
        "data": chosen.data_name,
        "epochs": len(result.return_value),
        "run": os.path.basename(result.path.rstrip("/")),
        "checkpoint": os.path.basename(result.checkpoint.path.rstrip("/")),
    }
    for folder in (chosen.path("runs", record["run"]), chosen.path("runs")):
        filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
        with filesystem.open_output_stream(f"{path}/{_record_name(chosen, folder)}") as stream:
            stream.write(json.dumps(record, indent=2).encode())


def latest(chosen: settings.Settings) -> dict:
    """Return the latest evaluation of the chosen data source, as `save` kept it.

    Raises:
        FileNotFoundError: no lesson 05 has been run with this data source and storage.
    """
    folder = chosen.path("runs")
    filesystem, path = pyarrow.fs.FileSystem.from_uri(folder)
    with filesystem.open_input_stream(f"{path}/{_record_name(chosen, folder)}") as stream:
        return json.loads(stream.read())


def _record_name(chosen: settings.Settings, folder: str) -> str:
    return f"latest-{chosen.data_name}.json" if folder == chosen.path("runs") else "evaluation.json"
