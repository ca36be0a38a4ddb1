"""A trained checkpoint back in memory, images decoded for it, and the record that is kept of its test accuracy."""

import io
import json
import os

import numpy as np
import pyarrow.fs
import ray.train
import torch

from helpers import _sources, data, settings
from helpers.model import build_model


def load_model(checkpoint: ray.train.Checkpoint) -> tuple[torch.nn.Module, dict]:
    """Return the trained network in evaluation mode, and the `train_loop_config` that it was trained with."""
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    model = build_model(state["config"]["num_classes"], state["config"]["image_size"])
    model.load_state_dict(state["model"])
    return model.eval(), state["config"]


def decode_image(content: bytes, size: int) -> np.ndarray:
    """Return an image file's bytes as uint8 (size, size, 3), decoded as the training images were; or ValueError."""
    try:
        return _sources.decode_file(io.BytesIO(content), size)
    except Exception:  # Pillow raises many kinds
        raise ValueError("These bytes are no image that can be decoded: send a whole JPEG or PNG file.") from None


def save(result: ray.train.Result, accuracy: float, num_images: int, cfg: settings.Settings) -> None:
    """Keep the test accuracy, 0 to 1, of a checkpoint: in its run's folder, and as the latest of its data source."""
    record = {
        "accuracy": accuracy,
        "num_images": num_images,
        "data": cfg.data_name,
        "prepared": data.prepare(cfg).rpartition("/data/")[2],
        "epochs": len(result.return_value),
        "run": os.path.basename(result.path.rstrip("/")),
        "checkpoint": os.path.basename(result.checkpoint.path.rstrip("/")),
    }
    filesystem, path = pyarrow.fs.FileSystem.from_uri(cfg.path("runs"))
    for file in (f"{record['run']}/evaluation.json", f"latest-{cfg.data_name}.json"):
        with filesystem.open_output_stream(f"{path}/{file}") as stream:
            stream.write(json.dumps(record, indent=2).encode())


def latest(cfg: settings.Settings) -> dict:
    """Return the latest record that `save` kept for the data source; FileNotFoundError before any lesson 05."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(cfg.path("runs"))
    with filesystem.open_input_stream(f"{path}/latest-{cfg.data_name}.json") as stream:
        return json.loads(stream.read())


def trained_checkpoint(cfg: settings.Settings) -> ray.train.Checkpoint:
    """Return the checkpoint of the `latest` record; train one, and keep its test accuracy, when there is none."""
    if checkpoint := _kept_checkpoint(cfg):
        return checkpoint
    # Here and not above: processes that only load a checkpoint do without the trainer.
    from helpers.progress import show_progress
    from helpers.trainer import build_trainer
    from helpers.training import evaluate

    print(f"There is no trained checkpoint for {cfg.data_name} yet: training one first, as lesson 05 does.")
    trainer = build_trainer(cfg)
    with show_progress(trainer):
        result = trainer.fit()
    model, config = load_model(result.checkpoint)
    _, correct, count = evaluate(model, data.load("test", cfg).iter_torch_batches(batch_size=256), config).tolist()
    save(result, correct / count, int(count), cfg)
    return _kept_checkpoint(cfg)


def _kept_checkpoint(cfg: settings.Settings) -> ray.train.Checkpoint | None:
    try:
        record = latest(cfg)
    except FileNotFoundError:
        return None
    # One that was trained on other images under the same name does not count, nor one that was deleted.
    checkpoint = ray.train.Checkpoint(cfg.path("runs", record["run"], record["checkpoint"]))
    exists = checkpoint.filesystem.get_file_info(f"{checkpoint.path}/state.pt").type == pyarrow.fs.FileType.File
    same_data = record.get("prepared") == data.prepare(cfg).rpartition("/data/")[2]
    return checkpoint if exists and same_data else None
