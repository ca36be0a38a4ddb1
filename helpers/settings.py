"""Every choice a learner can make, read once and checked once.

A choice comes from, in this order: an environment variable `TUTORIAL_*`, what `choose()` saved for all lessons in the
project's `storage/settings.json`, the default. `make clean` deletes that file.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_STORAGE = PROJECT / "storage"
SAVED_CHOICES = Path(os.environ.get("TUTORIAL_CHOICES", DEFAULT_STORAGE / "settings.json"))


class SettingError(ValueError):
    """A setting has a value that is not allowed; the message says which are."""


def _setting(default, allowed: str, is_allowed: Callable):
    """One line of the table below: the default, what is allowed in words, and the same as a test."""
    return field(default=default, metadata={"allowed": allowed, "is_allowed": is_allowed})


def _one_of(default: str, *others: str):
    names = (default, *others)
    return _setting(default, f"{', '.join(names[:-1])} or {names[-1]}", lambda value: value in names)


def _is_data(value: str) -> bool:
    return value in ("digits", "cifar10") or "://" in value or Path(value).expanduser().is_dir()


def _is_archive(value: str) -> bool:
    return not value or Path(value).expanduser().is_file()


@dataclass(frozen=True, repr=False)
class Settings:
    """The learner's choices. Each field `name` is the variable `TUTORIAL_NAME`."""

    # A folder of images is `<split>/<class>/…` or `<class>/…`. Augmentation differs in each run, whatever the seed is.
    data: str = _setting("digits", "digits, cifar10, or the path or URI of a folder that holds images", _is_data)
    epochs: int = _setting(4, "a whole number from 1 to 1000", lambda n: 1 <= n <= 1000)  # passes over `train`
    workers: int = _setting(0, "a number from 1 to 1024, or 0 for what suits the machine", lambda n: 0 <= n <= 1024)
    batch_size: int = _setting(64, "a whole number from 2 to 65536", lambda n: 2 <= n <= 65536)  # of all workers
    learning_rate: float = _setting(0.03, "a number above 0, at most 10", lambda x: 0 < x <= 10)  # the highest
    seed: int = _setting(42, "a whole number from 0 to 2147483647", lambda n: 0 <= n < 2**31)  # weights, shuffle
    image_size: int = _setting(32, "a whole number of pixels from 8 to 1024", lambda n: 8 <= n <= 1024)  # width, height
    storage: str = _setting(str(DEFAULT_STORAGE), "a folder, or a URI such as s3://bucket/path", bool)
    cifar10_archive: str = _setting("", "the path of a file cifar-10-python.tar.gz that exists", _is_archive)
    flip: str = _one_of("auto", "yes", "no")  # mirror images at random when augmenting; auto: all data but the digits
    on_bad_image: str = _one_of("stop", "skip")  # what to do with an image that can't be decoded
    logs: str = _one_of("quiet", "verbose")  # verbose shows Ray's own logs in the notebook

    def __repr__(self) -> str:
        words = {"workers": "0, as many as suit the machine", "cifar10_archive": "none given"}
        shown = {name: value or words.get(name, value) for name, value in asdict(self).items()}
        return "\n".join(f"{name:<16} {hide_secret(str(value))}" for name, value in shown.items())

    @property
    def data_name(self) -> str:
        """A short name of the data source for run names and titles: `digits`, `cifar`, or the folder's name."""
        if self.data in ("digits", "cifar10"):
            return self.data.removesuffix("10")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.data.partition("?")[0]).name).strip("-.") or "images"
        return f"{name}-folder" if name in ("digits", "cifar") else name

    @property
    def flips(self) -> bool:
        """Whether augmentation mirrors images: a mirrored bird is a bird, a mirrored 2 is not a digit."""
        return self.flip == "yes" or (self.flip == "auto" and self.data != "digits")

    def path(self, *parts: str) -> str:
        """Join `parts` to the storage location, which may be a local folder or a URI."""
        return join(self.storage, *parts)


def join(location: str, *parts: str) -> str:
    """Append `parts` to a folder or a URI, whose query, such as `?endpoint_override=…`, stays at the end."""
    path, mark, query = location.partition("?") if "://" in location else (location, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def hide_secret(text: str) -> str:
    """Return `text` without the keys in a URI such as `s3://key:secret@bucket`."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def load() -> Settings:
    """Read the learner's choices as they stand now; a SettingError names a value that is not allowed, and what is."""
    values = _saved_choices()
    kinds = {f.name: f.type for f in fields(Settings)}
    for variable, text in env_overrides().items():
        name = variable.removeprefix("TUTORIAL_").lower()
        try:
            values[name] = kinds[name](text)
        except ValueError:
            noun = "whole number" if kinds[name] is int else "number"
            raise SettingError(f"{variable}={text!r} is not a {noun}.") from None
    return _checked(Settings(**values))


def choose(**choices) -> Settings:
    """Save choices, `None` for a default, and return the settings; or raise SettingError and save nothing."""
    names = [f.name for f in fields(Settings)]
    if unknown := sorted(set(choices) - set(names)):
        raise SettingError(f"There is no setting {unknown[0]!r}. The settings are: {', '.join(names)}.")
    saved = {name: value for name, value in {**_saved_choices(), **choices}.items() if value is not None}
    checked = asdict(_checked(Settings(**saved)))
    if choices:
        try:
            SAVED_CHOICES.parent.mkdir(parents=True, exist_ok=True)
            temporary = SAVED_CHOICES.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({name: checked[name] for name in saved}, indent=2))
            temporary.replace(SAVED_CHOICES)
        except OSError as error:
            variables = " ".join(f"TUTORIAL_{name.upper()}={value}" for name, value in choices.items())
            what = f"The choices can't be saved in {SAVED_CHOICES} ({error.strerror})"
            raise SettingError(f"{what}: start JupyterLab with {variables} instead.") from error
    return load()


def require_writable(cfg: Settings) -> None:
    """Raise SettingError when the storage folder can't be made or written; a URI is checked when it is first used."""
    if "://" in cfg.storage:
        return
    try:
        Path(cfg.storage).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.storage):
            pass
    except OSError as error:
        what = f"The storage folder {cfg.storage} can't be written ({error.strerror})"
        raise SettingError(f"{what}: set TUTORIAL_STORAGE to a folder that you may write to.") from error


def env_overrides() -> dict[str, str]:
    """The environment variables that override a choice at present: their names and values."""
    variables = [f"TUTORIAL_{f.name.upper()}" for f in fields(Settings)]
    return {name: os.environ[name] for name in variables if os.environ.get(name, "") != ""}


def is_chosen(name: str) -> bool:
    """Whether the learner chose the setting `name`, by a variable or by `choose()`; else it has its default."""
    return f"TUTORIAL_{name.upper()}" in env_overrides() or name in _saved_choices()


def _saved_choices() -> dict:
    try:
        saved = json.loads(SAVED_CHOICES.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        what = f"The saved choices in {SAVED_CHOICES} can't be read"
        raise SettingError(f"{what} ({error}); delete that file.") from error
    return {f.name: saved[f.name] for f in fields(Settings) if f.name in saved}


def _checked(cfg: Settings) -> Settings:
    """Return `cfg` with paths made absolute, or raise the sentence that says what is allowed."""
    for f in fields(Settings):
        value = getattr(cfg, f.name)
        right_type = isinstance(value, (int, float) if f.type is float else f.type) and not isinstance(value, bool)
        if not right_type or not f.metadata["is_allowed"](value):
            allowed = f.metadata["allowed"] if right_type else f"a value of type {f.type.__name__}"
            raise SettingError(f"The setting {f.name} (TUTORIAL_{f.name.upper()}) can't be {value!r}: use {allowed}.")
    paths = {name: getattr(cfg, name) for name in ("data", "storage", "cifar10_archive")}
    local = {n: path for n, path in paths.items() if path not in ("digits", "cifar10", "") and "://" not in path}
    return replace(cfg, **{name: str(Path(path).expanduser().resolve()) for name, path in local.items()})
