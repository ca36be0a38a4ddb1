"""Train a ResNet-18 on images with Ray: lessons 01 to 05 as one script, without the helpers of this series.

    python train.py [--name NAME] [--storage DIR] [--epochs N] [--workers N]

The same NAME resumes an interrupted run from its last checkpoint; keep --epochs and --workers then. On a cluster, all
machines must reach the storage: a shared folder or a URI such as s3://bucket/path. Lesson 14 submits this as a job.
"""

import argparse
import os
import tempfile
from datetime import datetime

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import resnet18


def load_splits():  # for images of your own: ray.data.read_parquet(…, shuffle="files") and the like, see lesson 01
    digits = load_digits()
    images = (digits.images * 15.9).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)  # (1797, 32, 32)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(images[..., None].repeat(3, axis=3))
    table = pa.table({"image": tensor, "label": digits.target})
    rows = np.random.default_rng(0).permutation(len(images))
    train, validation, test = (table.take(part) for part in np.split(rows, [1300, 1440]))
    # Several blocks, so that tasks share them and each epoch has them in a new order.
    train_ds = ray.data.from_arrow(train, override_num_blocks=8).randomize_block_order()
    return train_ds, ray.data.from_arrow(validation), ray.data.from_arrow(test)


def augment(batch):  # runs in Ray Data's tasks: shifts each image by up to 2 pixels, differently in each epoch
    rng = np.random.default_rng()
    shifted = [np.roll(image, rng.integers(-2, 3, size=2), axis=(0, 1)) for image in batch["image"]]
    return {**batch, "image": np.stack(shifted)}


def build_model():
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # the original one is for 224×224 images
    return model


def predict(model, batch):  # from stored images, uint8 (batch, height, width, 3), to logits
    return model(batch["image"].permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1)


@torch.no_grad()
def accuracy(model, dataset):
    model.eval()
    batches = dataset.iter_torch_batches(batch_size=256)
    return torch.cat([predict(model, batch).argmax(1) == batch["label"] for batch in batches]).float().mean().item()


def load_states(checkpoint):
    with checkpoint.as_directory() as folder:
        return torch.load(f"{folder}/states.pt", map_location="cpu", weights_only=True)


def train_loop(config):  # runs in every worker process
    model = prepare_model(build_model())
    bare_model = getattr(model, "module", model)  # with one worker there is no DDP wrapper
    is_first = ray.train.get_context().get_world_rank() == 0  # its model and its metrics are kept
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=config["total_steps"])
    parts, first_epoch = {"model": bare_model, "optimizer": optimizer, "scheduler": scheduler}, 0
    if checkpoint := ray.train.get_checkpoint():  # the run was interrupted before
        states = load_states(checkpoint)
        first_epoch = states["epochs"]
        for name, part in parts.items():
            part.load_state_dict(states[name])
        if is_first:
            print(f"resumed after epoch {first_epoch}")
    train_shard, validation_ds = (ray.train.get_dataset_shard(name) for name in ("train", "validation"))
    for epoch in range(first_epoch, config["epochs"]):
        model.train()
        for batch in train_shard.iter_torch_batches(
            batch_size=config["batch_size"], drop_last=True, local_shuffle_buffer_size=256, local_shuffle_seed=epoch
        ):
            loss = nn.functional.cross_entropy(predict(model, batch), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        metrics, checkpoint = {"epoch": epoch + 1, "validation_accuracy": accuracy(bare_model, validation_ds)}, None
        with tempfile.TemporaryDirectory() as folder:
            if is_first:
                print(f"epoch {epoch + 1}/{config['epochs']}: {metrics}")
                states = {"epochs": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}
                torch.save(states, f"{folder}/states.pt")
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)  # the workers wait here for each other


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default=f"train-{datetime.now():%Y%m%d-%H%M%S}")
    parser.add_argument("--storage", default=os.path.expanduser("~/ray_results"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=torch.cuda.device_count() or 2)  # one for each GPU here
    args = parser.parse_args()

    # Without a cluster: a Ray with one CPU for each worker, and two for the tasks that augment.
    ray.init(**({} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": args.workers + 2}))
    ray.data.DataContext.get_current().enable_progress_bars = False  # they would fill a job's log
    train_ds, validation_ds, test_ds = load_splits()
    batch_size = 64 // args.workers
    total_steps = args.epochs * (train_ds.count() // args.workers // batch_size)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"epochs": args.epochs, "batch_size": batch_size, "total_steps": total_steps},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=ray.cluster_resources().get("GPU", 0) > 0),
        run_config=RunConfig(
            name=args.name,
            storage_path=args.storage if "://" in args.storage else os.path.abspath(args.storage),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="validation_accuracy"),
        ),
        datasets={"train": train_ds.map_batches(augment), "validation": validation_ds},
        dataset_config=DataConfig(datasets_to_split=["train"]),  # every worker validates on all images
    )
    best = load_states(trainer.fit().get_best_checkpoint("validation_accuracy", mode="max"))
    model = build_model()
    model.load_state_dict(best["model"])
    print(f"test accuracy {accuracy(model, test_ds):.3f} ({args.name}, epoch {best['epochs']} of {args.epochs})")
