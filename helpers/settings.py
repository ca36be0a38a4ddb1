"""Every choice a reader can make, read once and checked once.

A choice comes from, in this order: an environment variable `TUTORIAL_*`, what was saved by `choose()` in a notebook,
the default. `choose()` writes to `storage/settings.json` in the project's folder, so a choice made in lesson 00 holds
in the later lessons without restarting JupyterLab; `make clean` forgets it.
"""

import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_STORAGE = PROJECT / "storage"
SAVED_CHOICES = Path(os.environ.get("TUTORIAL_CHOICES", DEFAULT_STORAGE / "settings.json"))


class SettingError(ValueError):
    """A setting has a value that is not allowed; the message says which are."""


@dataclass(frozen=True, repr=False)
class Settings:
    """The reader's choices. Each field `name` is the variable `TUTORIAL_NAME`.

    Attributes:
        data: `digits`, `cifar10`, or the path of a folder `<split>/<class>/*.{jpg,jpeg,png}`.
        epochs: passes over the training split, 1 to 1000.
        workers: training worker processes; 0 means as many as suit this machine or cluster.
        batch_size: the global batch size in pictures, shared by all workers, 2 to 65536.
        learning_rate: the highest learning rate of the one-cycle schedule.
        seed: of the weights and of the shuffle inside each worker; augmentation and the order of blocks differ anyway.
        storage: where data, runs and checkpoints go: a local folder or a URI such as `s3://bucket/path`.
        cifar10_archive: a CIFAR-10 archive that the reader has; empty means download or look in the data folder.
        flip: mirror pictures at random when augmenting: `yes`, `no`, or `auto`, which spares the digits.
        unreadable: what to do with a picture that can't be decoded: `stop` or `skip`.
        logs: `quiet`, or `verbose` to see Ray's own logs in the notebook.
    """

    data: str = "digits"
    epochs: int = 4
    workers: int = 0
    batch_size: int = 64
    learning_rate: float = 0.03
    seed: int = 42
    storage: str = str(DEFAULT_STORAGE)
    cifar10_archive: str = ""
    flip: str = "auto"
    unreadable: str = "stop"
    logs: str = "quiet"

    def __repr__(self) -> str:
        chosen = asdict(self)
        chosen["workers"] = self.workers or "0, as many as suit the machine"
        chosen["cifar10_archive"] = self.cifar10_archive or "none given"
        return "\n".join(f"{name:<16} {value}" for name, value in chosen.items())

    @property
    def data_name(self) -> str:
        """A short name of the data source for run names and titles: `digits`, `cifar`, or the folder's name."""
        if self.data in ("digits", "cifar10"):
            return self.data.removesuffix("10")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.data).name).strip("-") or "pictures"
        return f"{name}-folder" if name in ("digits", "cifar") else name

    @property
    def flips(self) -> bool:
        """Whether augmentation mirrors pictures: a mirrored bird is a bird, a mirrored 2 is no digit."""
        return self.flip == "yes" or (self.flip == "auto" and self.data != "digits")

    def path(self, *parts: str) -> str:
        """Join `parts` to the storage location, which may be a local folder or a URI."""
        return "/".join([self.storage.rstrip("/"), *parts])


def load() -> Settings:
    """Read the reader's choices as they stand now.

    Raises:
        SettingError: a value is not allowed; the sentence names the setting, the value and what is allowed.
    """
    saved = _saved_choices()
    values = {}
    for field in fields(Settings):
        variable = f"TUTORIAL_{field.name.upper()}"
        if os.environ.get(variable, "") != "":
            values[field.name] = _parse(variable, os.environ[variable], field.type)
        elif field.name in saved:
            values[field.name] = saved[field.name]
    return _checked(Settings(**values))


def choose(**choices) -> Settings:
    """Save choices for this and the later lessons, and return the settings as they now stand.

    Without arguments nothing changes. `None` returns a setting to its default. An environment variable still wins.

    Raises:
        SettingError: a name is unknown or a value is not allowed; nothing is saved then.
    """
    names = [field.name for field in fields(Settings)]
    unknown = sorted(set(choices) - set(names))
    if unknown:
        raise SettingError(f"There is no setting {unknown[0]!r}. The settings are: {', '.join(names)}.")
    saved = {**_saved_choices(), **choices}
    saved = {name: value for name, value in saved.items() if value is not None}
    checked = asdict(_checked(Settings(**saved)))
    if choices:
        SAVED_CHOICES.parent.mkdir(parents=True, exist_ok=True)
        beside = SAVED_CHOICES.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({name: checked[name] for name in saved}, indent=2))
        beside.replace(SAVED_CHOICES)
    return load()


def make_paths_absolute() -> None:
    """Rewrite relative paths in TUTORIAL_* variables, for notebooks that will run in another folder."""
    chosen = load()
    for name in ("data", "storage", "cifar10_archive"):
        if f"TUTORIAL_{name.upper()}" in overridden():
            os.environ[f"TUTORIAL_{name.upper()}"] = getattr(chosen, name)


def require_writable(chosen: Settings) -> None:
    """Raise a sentence when the storage folder can't be made or written; a URI is checked when it is first used.

    Raises:
        SettingError: names the folder, the reason and the remedy.
    """
    if "://" in chosen.storage:
        return
    try:
        Path(chosen.storage).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen.storage):
            pass
    except OSError as error:
        raise SettingError(
            f"The storage folder {chosen.storage} can't be written ({error.strerror}): "
            "set TUTORIAL_STORAGE to a folder that you may write to."
        ) from error


def overridden() -> dict[str, str]:
    """The environment variables that override a choice at present: their names and values."""
    variables = [f"TUTORIAL_{field.name.upper()}" for field in fields(Settings)]
    return {name: os.environ[name] for name in variables if os.environ.get(name, "") != ""}


def _saved_choices() -> dict:
    try:
        saved = json.loads(SAVED_CHOICES.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingError(
            f"The saved choices in {SAVED_CHOICES} can't be read ({error}); delete that file."
        ) from error
    known = {field.name for field in fields(Settings)}
    return {name: value for name, value in saved.items() if name in known}


def _parse(variable: str, text: str, kind: type):
    try:
        return kind(text)
    except ValueError:
        noun = "whole number" if kind is int else "number"
        raise SettingError(f"{variable}={text!r} is not a {noun}.") from None


def _checked(chosen: Settings) -> Settings:
    """Return `chosen` with paths made absolute, or raise the sentence that says what is allowed."""

    def fail(name: str, allowed: str):
        value = getattr(chosen, name)
        raise SettingError(f"The setting {name} (TUTORIAL_{name.upper()}) can't be {value!r}: use {allowed}.")

    for field in fields(Settings):
        value = getattr(chosen, field.name)
        if field.type is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, field.type) or isinstance(value, bool):
            fail(field.name, f"a value of type {field.type.__name__}")
    if not 1 <= chosen.epochs <= 1000:
        fail("epochs", "a whole number from 1 to 1000")
    if not 0 <= chosen.workers <= 1024:
        fail("workers", "a whole number from 1 to 1024, or 0 for as many as suit the machine")
    if not 2 <= chosen.batch_size <= 65536:
        fail("batch_size", "a whole number from 2 to 65536")
    if not 0 < chosen.learning_rate <= 10:
        fail("learning_rate", "a number above 0, at most 10")
    if not 0 <= chosen.seed < 2**31:
        fail("seed", "a whole number from 0 to 2147483647")
    if chosen.flip not in ("auto", "yes", "no"):
        fail("flip", "yes, no or auto")
    if chosen.unreadable not in ("stop", "skip"):
        fail("unreadable", "stop or skip")
    if chosen.logs not in ("quiet", "verbose"):
        fail("logs", "quiet or verbose")

    absolute = {}
    if chosen.data not in ("digits", "cifar10"):
        folder = Path(chosen.data).expanduser()
        if not folder.is_dir():
            fail("data", "digits, cifar10, or the path of a folder that holds train/<class>/*.jpg")
        absolute["data"] = str(folder.resolve())
    if chosen.cifar10_archive:
        archive = Path(chosen.cifar10_archive).expanduser()
        if not archive.is_file():
            fail("cifar10_archive", "the path of a file cifar-10-python.tar.gz that exists")
        absolute["cifar10_archive"] = str(archive.resolve())
    if not chosen.storage:
        fail("storage", "a folder, or a URI such as s3://bucket/path")
    if "://" not in chosen.storage:
        absolute["storage"] = str(Path(chosen.storage).expanduser().resolve())
    return Settings(**{**asdict(chosen), **absolute})
