"""What an interrupted epoch has left to read: what its checkpoint has not seen."""

import pyarrow as pa
import pytest
import ray
import torch
from ray.train import Checkpoint

from helpers import data_config

pytestmark = pytest.mark.usefixtures("shared_ray")


def test_remove_seen_keeps_the_others():
    table = pa.table({"id": pa.array([1, 2, 3, 4]), "label": pa.array([5, 6, 7, 8])})
    assert data_config.remove_seen(table, [2, 4])["label"].to_pylist() == [5, 7]
    assert data_config.remove_seen(table, []).num_rows == 4
    assert data_config.remove_seen(table, [1, 2, 3, 4]).num_rows == 0


@pytest.mark.parametrize(
    ("last", "seen"), [({"seen": [1, 2], "totals": [0, 0, 2]}, [1, 2]), ({"seen": [1, 2], "train_loss": 0.5}, [])]
)
def test_ids_seen_are_those_of_an_unfinished_epoch(tmp_path, last, seen):
    torch.save({"history": [{"train_loss": 1.0}, last]}, tmp_path / "state.pt")
    assert data_config.ids_seen(Checkpoint.from_directory(tmp_path)) == seen


def test_rest_of_epoch_is_everything_without_a_checkpoint(tmp_path):
    train_ds = ray.data.from_arrow(pa.table({"id": pa.array([1, 2])}))
    assert data_config.rest_of_epoch(train_ds, str(tmp_path / "no-such-run"))() is train_ds
