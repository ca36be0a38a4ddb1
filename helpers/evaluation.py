"""A trained checkpoint back in memory, what it answers for every test picture, and the record that is kept of it."""

import json
import os

import numpy as np
import pyarrow.fs
import ray.data
import ray.train
import torch

from helpers import data, settings
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
        "prepared": os.path.basename(data.prepare(chosen)),
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


def trained_checkpoint(chosen: settings.Settings) -> ray.train.Checkpoint:
    """Return the checkpoint that `latest` speaks of; train, evaluate and keep one first when there is none.

    A network that was trained on other pictures under the same name does not count, nor one that was deleted.

    Raises:
        ClusterError, DataError, ValueError: as `trainer.build_trainer`, when training is needed and can't be done.
    """
    checkpoint = _kept_checkpoint(chosen)
    if checkpoint is None:
        print(f"No network trained on {chosen.data_name} is kept yet: training one first, as lesson 05 does.")
        _train(chosen)
        checkpoint = _kept_checkpoint(chosen)
    return checkpoint


def _kept_checkpoint(chosen: settings.Settings) -> ray.train.Checkpoint | None:
    try:
        record = latest(chosen)
    except FileNotFoundError:
        return None
    checkpoint = ray.train.Checkpoint(chosen.path("runs", record["run"], record["checkpoint"]))
    there = checkpoint.filesystem.get_file_info(f"{checkpoint.path}/state.pt").type == pyarrow.fs.FileType.File
    same_pictures = record.get("prepared") == os.path.basename(data.prepare(chosen))
    return checkpoint if there and same_pictures else None


def _train(chosen: settings.Settings) -> None:
    # Here and not above: processes that only load a checkpoint do without the trainer.
    from helpers import progress
    from helpers.trainer import build_trainer

    trainer = build_trainer(chosen)
    with progress.shown(trainer):
        result = trainer.fit()
    model, config = load_model(result.checkpoint)
    answers = predict(model, config, data.load("test", chosen))
    right = answers["probability"].argmax(axis=1) == answers["label"]
    save(result, float(right.mean()), len(right), chosen)


def _record_name(chosen: settings.Settings, folder: str) -> str:
    return f"latest-{chosen.data_name}.json" if folder == chosen.path("runs") else "evaluation.json"
