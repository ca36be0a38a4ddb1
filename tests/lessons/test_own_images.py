"""The lesson that trains does so with a learner's own images, too: a folder of a few, in several sizes and formats."""

import nbformat

import run_lessons
from helpers import evaluation, settings
from support import NOTEBOOKS


def test_fit_with_a_folder_of_images(image_folder, tmp_path, monkeypatch, shared_ray):
    variables = {"DATA": image_folder, "STORAGE": tmp_path / "storage", "IMAGE_SIZE": 24, "EPOCHS": 3, "WORKERS": 2}
    for name, value in variables.items():
        monkeypatch.setenv(f"TUTORIAL_{name}", str(value))
    executed = tmp_path / "05_fit.ipynb"
    assert run_lessons.execute(NOTEBOOKS / "05_fit.ipynb", executed) is None
    record = evaluation.latest(settings.load())
    assert record["num_images"] == 14 and record["epochs"] == 3
    printed = nbformat.writes(nbformat.read(executed, as_version=4))
    assert "training images are held out" in printed
