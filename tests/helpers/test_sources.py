"""Any folder of images is read rightly or refused in one sentence. Most cases follow a public bug report."""

import contextlib
import os
import shutil
import struct
import tempfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from helpers import _sources
from helpers._sources import DataError

RED, BLUE, WHITE, PINK = (200, 30, 30), (30, 30, 200), (255, 255, 255), (255, 0, 255)


def plain(colour=RED, size=(40, 40), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


@pytest.fixture
def root(tmp_path):
    """A sound folder: two classes of three images in each of the three splits."""
    for split in _sources.SPLITS:
        for name, colour in (("blue", BLUE), ("red", RED)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                plain(colour).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


SOUND = {split: {"blue": 3, "red": 3} for split in _sources.SPLITS}


def listed(root):
    """How many images each class of each split has, and what was said."""
    listing, notes = _sources.list_folder(str(root))
    counts = {}
    for split, name, *_ in listing:
        classes = counts.setdefault(split, {})
        classes[name] = classes.get(name, 0) + 1
    return counts, "\n".join(notes)


def with_red(**counts):
    return {split: {"blue": 3, "red": counts.get(split, 3)} for split in _sources.SPLITS}


# --- what is listed ---


def test_a_uri_is_listed_and_decoded_as_its_folder(root):
    """Through a file system of PyArrow, as a bucket is."""
    (root / "train" / "red" / "a b%41?#").mkdir()
    plain().save(root / "train" / "red" / "a b%41?#" / "3.PNG")
    for name in (".hidden.png", "Thumbs.db", "note.txt", "broken.png"):
        (root / "train" / "red" / name).write_text("text")
    (root / "train" / "blue" / ".ipynb_checkpoints").mkdir()
    (from_folder, notes), (from_uri, same) = (_sources.list_folder(place) for place in (str(root), f"file://{root}"))
    assert [image[:2] + image[3:] for image in from_uri] == [image[:2] + image[3:] for image in from_folder]
    assert [note.replace("file://", "") for note in same] == notes and "1 × .txt file" in notes[0]
    images, _, refused = _sources.decode([image[2] for image in from_folder], 32)
    others, _, refused_too = _sources.decode([image[2] for image in from_uri], 32, f"file://{root}")
    assert np.array_equal(images, others) and len(images) == 19
    assert refused == refused_too and "is text, not an image" in "".join(refused.values())


SYSTEM = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".git", "@__thumb", "LOST.DIR")


@pytest.mark.parametrize("name", [*SYSTEM, "FOUND.001", "RECYCLED"])
@pytest.mark.parametrize("place", ["", "train", "test", "train/red"])
@pytest.mark.parametrize("filled", [True, False])
def test_hidden_and_system_folders_play_no_part(root, name, place, filled):
    before, _ = _sources.list_folder(str(root))
    (root / place / name / "blue").mkdir(parents=True)
    if filled:
        plain().save(root / place / name / "blue" / "0.png")
    after, notes = _sources.list_folder(str(root))
    assert after == before and ("1 × hidden" in notes[0] or place == "")


@pytest.mark.parametrize("name", ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"])
@pytest.mark.parametrize("place", [".", "train", "validation/red"])
def test_hidden_and_system_files_play_no_part(root, name, place):
    before, _ = _sources.list_folder(str(root))
    (root / place / name).write_bytes(b"\0\5\x16\7")
    assert _sources.list_folder(str(root))[0] == before


def test_what_is_passed_over_is_counted_by_kind_in_one_line(root):
    for name in ("train/a.csv", "train/red/b.csv", "train/red/._0.png", "test/readme", "test/movie.MPG"):
        (root / name).write_bytes(b"\0")
    (root / "holdout" / "red").mkdir(parents=True)
    plain().save(root / "train" / "loose.jpg")
    plain().save(root / "loose.jpg")
    os.mkfifo(root / "train" / "red" / "pipe.jpg")
    counts, said = listed(root)
    assert counts == SOUND and said.count("\n") == 0
    for kind in (
        "2 × .csv file",
        "1 × .mpg file",
        "1 × .jpg file",  # the pipe
        "1 × file without a suffix",
        "2 × image outside a class folder",
        "1 × folder that is no split (holdout)",
        "1 × hidden or system",
    ):
        assert kind in said


def test_many_kinds_that_are_passed_over_stay_one_short_line(root):
    for number in range(100):
        (root / "train" / "red" / f"note.{number}").write_bytes(b"")
    (root / "train" / "red" / "again.7").write_bytes(b"")
    assert "2 × .7 file" in listed(root)[1] and "89 × of other kinds" in listed(root)[1]


FORMATS = (
    "apng avif bmp dds dib gif icns ico im j2k jfif jp2 jpe jpeg jpg mpo pcx pgm png pnm ppm qoi sgi tga tif tiff webp"
)


@pytest.mark.parametrize("suffix", [*FORMATS.split(), "JPG", "Png", "WebP", "TIFF"])
def test_every_format_that_pillow_opens_is_read(root, suffix):
    path = root / "train" / "red" / f"3.{suffix}"
    plain(size=(64, 64)).save(path, format={"mpo": "JPEG", "pgm": "PPM"}.get(suffix))
    assert listed(root)[0] == with_red(train=4)
    assert np.abs(decoded(path).mean((0, 1)) - RED).max() < 12


@pytest.mark.parametrize(
    ("split", "name"),
    [("train", name) for name in ("training", "Train", "TRAINING")]
    + [("validation", name) for name in ("val", "valid", "dev", "Validation", "VAL", "Dev")]
    + [("test", name) for name in ("testing", "Test", "TESTING")],
)
def test_a_split_is_known_by_any_usual_name(root, split, name):
    os.rename(root / split, root / name)
    assert listed(root)[0] == SOUND


def test_classes_without_splits_are_all_for_training(root):
    counts, said = listed(root / "train")
    assert counts == {"train": {"blue": 3, "red": 3}} and said == ""


def test_folders_inside_a_class_are_read(root):
    (root / "train/red/2024/may").mkdir(parents=True)
    (root / "train/red/old.jpg").mkdir()  # a folder, whatever its name looks like
    os.rename(root / "train/red/0.png", root / "train/red/2024/may/0.png")
    os.rename(root / "train/red/1.png", root / "train/red/old.jpg/1.png")
    assert listed(root)[0] == SOUND


def test_a_name_in_two_unicode_forms_is_one_class(root):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    os.rename(root / "train/red", root / "train" / composed)
    os.rename(root / "test/red", root / "test" / decomposed)
    for form in (composed, decomposed):
        (root / "validation" / form).mkdir()
        plain().save(root / "validation" / form / "0.png")
    os.rename(root / "validation/red", root / "elsewhere")
    counts, _ = listed(root)
    assert [sorted(counts[split]) for split in counts] == [["blue", composed]] * 3
    assert counts["validation"][composed] == 2


def test_names_that_are_not_utf8_are_read_and_can_be_printed(root):
    os.rename(os.fsencode(root / "train/red/0.png"), os.fsencode(root) + b"/train/red/caf\xe9.png")
    (root / "train/red/1.png").write_bytes(b"")
    for split in _sources.SPLITS:
        os.rename(root / split / "red", os.fsencode(root / split) + b"/r\xf4t")
    listing, _ = _sources.list_folder(str(root))
    paths = [path for split, name, path, *_ in listing if split == "train" and name == r"r\xf4t"]
    images, kept, refused = _sources.decode(paths, 32)
    assert kept == [1, 2] and np.abs(images.mean((0, 1, 2)) - RED).max() < 2
    assert r"r\xf4t/1.png is empty" in refused[os.fsdecode(os.fsencode(root) + b"/train/r\xf4t/1.png")]
    " ".join(refused.values()).encode()


def test_a_class_that_a_split_lacks_is_named_and_shifts_no_label(root):
    for number in range(3):
        (root / f"test/blue/{number}.png").unlink()
    (root / "test/blue").rmdir()
    counts, said = listed(root)
    assert counts["test"] == {"red": 3} and said == "test has no image of blue."


def test_links_are_followed_and_changes_behind_them_are_noticed(root, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "red"
    os.rename(root / "train/red", away)
    (root / "train/red").symlink_to(away)
    (root / "train/blue/3.png").symlink_to(away / "0.png")
    before, _ = _sources.list_folder(str(root))
    assert listed(root)[0]["train"] == {"blue": 4, "red": 3}
    plain(BLUE, (50, 50)).save(away / "0.png")
    after, _ = _sources.list_folder(str(root))
    changed = {os.path.relpath(image[2], root) for image in set(after) - set(before)}
    assert changed == {"train/red/0.png", "train/blue/3.png"}


def test_two_images_that_change_places_are_noticed(root):
    """Their sizes and times may be equal, as after an archive is unpacked."""
    first, second = (root / "train" / name / "0.png" for name in ("blue", "red"))
    plain((200, 30, 31)).save(second)
    first.write_bytes(second.read_bytes()[::-1])
    for path in (first, second):
        os.utime(path, ns=(10**18, 10**18))
    before, _ = _sources.list_folder(str(root))
    second.rename(root / "aside")
    first.rename(second)
    (root / "aside").rename(first)
    assert _sources.list_folder(str(root))[0] != before


# --- what is refused, in one sentence ---


def moved(old, new):
    return lambda root: os.rename(root / old, root / new)


def made(*names):
    return lambda root: [(root / name).mkdir(parents=True) for name in names]


def linked(name, target):
    return lambda root: (root / name).symlink_to(root / target if target != "itself" else root / name)


def nested(split, name):
    def change(root):
        (root / split).rename(root / "aside")
        (root / split).mkdir()
        (root / "aside").rename(root / split / name)

    return change


def emptied(name):
    return lambda root: [file.unlink() for file in (root / name).rglob("*.png")]


def flattened(name):
    def change(root):
        for number, file in enumerate(list((root / name).rglob("*.png"))):
            file.rename(root / name / f"{number}.png")
        for folder in list((root / name).iterdir()):
            if folder.is_dir():
                folder.rmdir()

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (moved("train", "learn"), "has no folder train/: put the images"),
        (made("val/red"), "two folders for one split among .*val, validation: put all into one"),
        (made("Test"), "two folders for one split among Test, test"),
        (flattened("test"), "/test has no class folders: sort its images into test/<class>/"),
        (flattened("train"), "/train has no class folders: sort its images into train/<class>/"),
        (lambda root: [emptied("validation")(root), flattened("validation")(root)], "/validation has no class folders"),
        (emptied("train/red"), "/train/red holds no image that Pillow reads, by .* suffixes .*: add some, rename"),
        (emptied("test/red"), "/test/red holds no image"),
        (lambda root: [shutil.rmtree(root / split / "red") for split in SOUND], "has one class, blue, and needs two"),
        (moved("test/red", "test/green"), "/test has the class green, and train has not: add it there"),
        (moved("train/red", "elsewhere"), "/validation has the class red, and train has not"),
        (
            lambda root: [nested("train", "seg_train")(root), nested("test", "seg_test")(root)],
            "move them up into .*/train",
        ),
        (nested("train", "train"), "/train/train holds the class folders blue, red: move them up into .*/train"),
        (linked("train/red/up", "train"), "train/red/up leads back to a folder that it is in: remove it"),
        (linked("train/red/up", "."), "leads back"),
        (linked("train/red/up", "/"), "leads back"),
        (linked("train/red/up", "itself"), "train/red/up .*(leads nowhere|Too many levels)"),
        (linked("train/green", "nowhere"), "/train/green is a link that leads nowhere: repair or remove it"),
        (linked("train/red/2024", "nowhere"), "/train/red/2024 is a link that leads nowhere"),
    ],
)
def test_a_folder_that_can_not_be_used(root, change, says):
    change(root)
    with pytest.raises(DataError, match=says) as error:
        listed(root)
    assert "\n" not in str(error.value)


def test_a_link_in_a_circle_through_another_link(root, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    (away / "back").symlink_to(root / "train" / "red")
    (root / "train/red/away").symlink_to(away)
    with pytest.raises(DataError, match="leads back|Too many levels"):
        listed(root)


@pytest.mark.parametrize("splits", [("train", "test"), ()])
def test_a_data_set_one_level_deeper_is_named(tmp_path, splits):
    for split in splits or [""]:
        for name in ("blue", "red"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            plain().save(tmp_path / "images" / split / name / "0.png")
    with pytest.raises(DataError, match="images.*[sS]et TUTORIAL_DATA to it"):
        listed(tmp_path)


def test_splits_inside_the_classes_are_not_mixed(tmp_path):
    for name in ("blue/train", "blue/test", "red/train", "red/test"):
        (tmp_path / name).mkdir(parents=True)
        plain().save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="blue has a folder train/: set TUTORIAL_DATA to it, or fill train/<class>/"):
        listed(tmp_path)


LIKE_SPLITS = ("seg_train seg_test", "training_set test_set", "Train-Images Val-Images", "01 train|02 test")
LIKE_SPLITS += ("x_train_1 x_test_1", "traindata testdata", "train_dataset test_dataset", "Train Photos|Test Photos")


@pytest.mark.parametrize("names", LIKE_SPLITS)
def test_splits_by_other_names_do_not_become_classes(tmp_path, names):
    for name in names.split("|" if "|" in names else None):
        for class_name, colour in (("blue", BLUE), ("red", RED)):
            (tmp_path / name / class_name).mkdir(parents=True)
            plain(colour).save(tmp_path / name / class_name / "0.png")
    with pytest.raises(DataError, match=r"folders that look like splits \(.*\): rename them train, validation, test\."):
        listed(tmp_path)


def test_equal_folders_in_all_classes_are_named(root):
    """Such as masks, which are no images of the class; folders that differ, such as dates, are nothing special."""
    for split in ("train", "test"):
        for name in ("blue", "red"):
            for kind in ("images", "masks") if split == "train" else (name, "b"):
                (root / split / name / kind).mkdir()
                plain().save(root / split / name / kind / "a.png")
    said = listed(root)[1]
    assert said == f"All classes in {root}/train have the folders images, masks, read as one: is that right?"


def test_a_class_of_recycled_things_is_a_class(tmp_path):
    for name in ("compost", "recycled"):
        (tmp_path / name).mkdir()
        plain().save(tmp_path / name / "0.png")
    assert listed(tmp_path)[0] == {"train": {"compost": 1, "recycled": 1}}


@pytest.mark.parametrize(
    "names", [("bullet_train", "ship"), ("strain", "contest"), ("trainer", "sandal"), ("devil", "a")]
)
def test_classes_whose_names_hold_that_of_a_split_stay_classes(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        plain().save(tmp_path / name / "0.png")
    assert listed(tmp_path)[0] == {"train": dict.fromkeys(names, 1)}


def test_control_characters_of_names_are_escaped(root):
    (root / "train/red/a\x1b[31m\r.\u2028b.txt").write_text("")
    (root / "train/red/a\x1b[31m\tb.png").write_bytes(b"")
    (_, _, path, *_), *_ = (image for image in _sources.list_folder(str(root))[0] if "b.png" in image[2])
    said = listed(root)[1] + _sources.decode([path], 32)[2][path]
    assert r"a\x1b[31m\tb.png is empty" in said and said.isprintable()


@contextlib.contextmanager
def another_user():
    """Root may read everything, so become somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_may_not_be_read_is_named_with_the_reason():
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        for name in ("train/blue", "train/red", "train/red/sealed"):
            Path(scratch, name).mkdir(parents=True)
            plain().save(f"{scratch}/{name}/0.png")
        os.chmod(f"{scratch}/train/blue/0.png", 0)
        with another_user():
            _, _, refused = _sources.decode([f"{scratch}/train/blue/0.png"], 32)
        assert "blue/0.png can't be read (Permission denied): change its permissions" in refused.popitem()[1]
        os.chmod(f"{scratch}/train/red/sealed", 0)
        with another_user(), pytest.raises(DataError, match="/train/red/sealed can't be read .Permission denied"):
            listed(scratch)
        os.chmod(f"{scratch}/train/red/sealed", 0o755)


# --- what an image is decoded to ---


def decoded(path, size=32):
    images, kept, refused = _sources.decode([str(path)], size)
    assert kept == [0], refused
    assert images.shape == (1, size, size, 3) and images.dtype == np.uint8
    return images[0]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, pixels, bits, colour_type, *chunks):
    """Write a PNG of kinds that Pillow can't write; `pixels` has a row of bytes for each line."""
    height, width = len(pixels), len(pixels[0]) * 8 // bits // {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    lines = zlib.compress(b"".join(b"\0" + bytes(row) for row in pixels))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def tiff(path, values, bits, order="<", photometric=1, packed=None):
    """Write an uncompressed grey TIFF of any depth and byte order."""
    height, width = values.shape
    data = packed or values.astype(f"{order}u{bits // 8}").tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 9 * 12 + 4, 277: 1}
    entries |= {278: height, 279: len(data)}
    fields = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    path.write_bytes(head + struct.pack(f"{order}H", len(entries)) + fields + bytes(4) + data)


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def ramp(top, kind):
    return (RAMP * top).round().astype(kind)


def packed_12_bits(values):
    bits = "".join(f"{value:012b}" for value in values.ravel())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def fits(path, values):
    """Write 16 bits as astronomers do: signed, with 32768 to be added."""
    height, width = values.shape
    fields = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height, "BZERO": 32768, "BSCALE": 1}
    cards = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in fields.items()) + "END"
    data = values[::-1].astype(">i2").tobytes()  # from the bottom row to the top one
    path.write_bytes(cards.ljust(2880).encode() + data.ljust(-(-len(data) // 2880) * 2880, b"\0"))


def float_tiff(path, values, **save):
    Image.fromarray(values).save(path, format="TIFF", **save)


def without_a_corner(value):
    """A ramp whose darkest corner has no value."""
    values = ramp(1000, "f4") - 1
    values[:3, :1] = value
    return values


DEEP_GREY = {
    "16-bit PNG": lambda path: Image.fromarray(ramp(65535, "u2")).save(path, format="PNG"),
    "16-bit TIFF": lambda path: tiff(path, ramp(65535, "u2"), 16),
    "16-bit TIFF, big-endian": lambda path: tiff(path, ramp(65535, "u2"), 16, ">"),
    "16-bit TIFF, 0 is white": lambda path: tiff(path, ramp(65535, "u2")[:, ::-1], 16, photometric=0),
    "16-bit TIFF, compressed": lambda path: Image.fromarray(ramp(65535, "u2")).save(path, "TIFF", compression="lzma"),
    "16-bit PGM": lambda path: Image.fromarray(ramp(65535, "i4")).save(path, format="PPM"),
    "16-bit JPEG 2000": lambda path: Image.fromarray(ramp(65535, "u2")).save(path, format="JPEG2000"),
    "12 bits in a 16-bit PNG": lambda path: Image.fromarray(ramp(4095, "u2")).save(path, format="PNG"),
    "12 bits in a 16-bit TIFF": lambda path: tiff(path, ramp(4095, "u2"), 16, ">"),
    "12-bit TIFF": lambda path: tiff(path, RAMP, 12, packed=packed_12_bits(ramp(4095, "u2"))),
    "12-bit PGM": lambda path: path.write_bytes(b"P5 64 64 4095\n" + ramp(4095, ">u2").tobytes()),
    "10 bits in a 16-bit PNG": lambda path: Image.fromarray(ramp(1023, "u2")).save(path, format="PNG"),
    "14 bits in a 16-bit TIFF": lambda path: tiff(path, ramp(16383, "u2"), 16),
    "8 bits in a 16-bit PNG": lambda path: Image.fromarray(ramp(255, "u2")).save(path, format="PNG"),
    "32-bit TIFF": lambda path: Image.fromarray(ramp(2_000_000_000, "i4")).save(path, format="TIFF"),
    "unsigned 16-bit FITS": lambda path: fits(path, ramp(60000, "i4") - 32768),
    "unsigned 32-bit TIFF": lambda path: tiff(path, ramp(4_000_000_000, "u4"), 32),
    "signed TIFF": lambda path: Image.fromarray(ramp(4000, "i4") - 1000).save(path, format="TIFF"),
    "float TIFF up to 1": lambda path: Image.fromarray(ramp(255, "f4") / 255).save(path, format="TIFF"),
    "float TIFF up to 255": lambda path: Image.fromarray(ramp(255, "f4")).save(path, format="TIFF"),
    "float TIFF a little beyond 0 and 1": lambda path: float_tiff(path, ramp(265, "f4") / 255 - 0.02),
    "float TIFF a little beyond 255": lambda path: float_tiff(path, ramp(258, "f4")),
    "metres": lambda path: float_tiff(path, ramp(255, "f4") / 30),
    "kelvins": lambda path: float_tiff(path, ramp(255, "f4") / 5 + 270),
    "no data, as GDAL writes it": lambda path: float_tiff(path, without_a_corner(-9999), tiffinfo={42113: "-9999"}),
    "no data, as NumPy writes it": lambda path: float_tiff(path, without_a_corner(np.nan)),
    "no data of 32 bits": lambda path: float_tiff(path, without_a_corner(-3.4e38)),
    "float TIFF below 0": lambda path: Image.fromarray(ramp(2000, "f4") - 1000).save(path, format="TIFF"),
}


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_deep_grey_keeps_its_range(tmp_path, kind):
    """As a ramp from black to white of 8 bits would be, to within a grey level or two."""
    DEEP_GREY[kind](tmp_path / "a.png")
    plain_ramp = tmp_path / "b.png"
    Image.fromarray(ramp(255, "u1")).save(plain_ramp)
    difference = np.abs(decoded(tmp_path / "a.png").astype(int) - decoded(plain_ramp))
    assert difference.max() <= (6 if "beyond" in kind else 2)


@pytest.mark.parametrize("level", [10, 100, 255])
def test_grey_of_16_bits_without_contrast_keeps_its_level(tmp_path, level):
    Image.fromarray(np.full((40, 40), 257 * level, "u2")).save(tmp_path / "a.png")
    assert np.abs(decoded(tmp_path / "a.png").astype(int) - level).max() <= 1


def test_missing_values_of_a_float_image_do_no_harm(tmp_path):
    values = ramp(1, "f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert 120 < decoded(tmp_path / "a.tiff").mean() < 135


def logo(colour, hidden=PINK):
    """A square of a colour in the middle of a transparent ground that has a hidden colour."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[16:48, 16:48] = (*colour, 255)
    return Image.fromarray(pixels)


def paletted(path, **save):
    indices = np.zeros((64, 64), np.uint8)
    indices[16:48, 16:48] = 1
    image = Image.fromarray(indices).convert("P")
    image.putpalette([*PINK, *RED])
    image.save(path, **save)


def keyed(path, hidden, drawn, bits, colour_type):
    """A PNG in which one colour is declared transparent."""
    pack = {8: "B", 16: "H"}[bits]
    row = [*hidden * 16, *drawn * 32, *hidden * 16]
    edge = [*hidden * 64]
    lines = [struct.pack(f">{len(line)}{pack}", *line) for line in [edge] * 16 + [row] * 32 + [edge] * 16]
    png(path, lines, bits, colour_type, chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)))


GREY = (81, 81, 81)
TRANSPARENT = {
    "RGBA PNG": (RED, lambda path: logo(RED).save(path)),
    "RGBA WebP": (RED, lambda path: logo(RED).save(path, format="WEBP", lossless=True)),
    "RGBA TIFF": (RED, lambda path: logo(RED).save(path, format="TIFF")),
    "RGBA TGA": (RED, lambda path: logo(RED).save(path, format="TGA")),
    "RGBA with a black hidden colour": (RED, lambda path: logo(RED, (0, 0, 0)).save(path)),
    "LA PNG": (GREY, lambda path: logo(GREY, (9, 9, 9)).convert("LA").save(path)),
    "LA TIFF": (GREY, lambda path: logo(GREY, (9, 9, 9)).convert("LA").save(path, format="TIFF")),
    "palette with a transparent entry": (RED, lambda path: paletted(path, transparency=0)),
    "palette with an opacity for each": (RED, lambda path: paletted(path, transparency=b"\0\xff")),
    "GIF": (RED, lambda path: paletted(path, format="GIF", transparency=0)),
    "RGB with a transparent colour": (RED, lambda path: keyed(path, PINK, RED, 8, 2)),
    "grey with a transparent level": (GREY, lambda path: keyed(path, (9,), GREY[:1], 8, 0)),
    "16-bit grey with a transparent level": (GREY, lambda path: keyed(path, (40000,), (81 * 257,), 16, 0)),
    "16-bit RGB with a transparent colour": (
        RED,
        lambda path: keyed(path, tuple(257 * c for c in PINK), tuple(257 * c for c in RED), 16, 2),
    ),
    "black drawing": ((0, 0, 0), lambda path: logo((0, 0, 0), (0, 0, 0)).save(path)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_transparent_ground_becomes_white(tmp_path, kind):
    colour, write = TRANSPARENT[kind]
    write(tmp_path / "a.png")
    image = decoded(tmp_path / "a.png").astype(int)
    assert np.abs(image[10:22, 10:22] - colour).max() <= 2, "the drawing"
    assert (image[:6] == 255).all() and (image[:, -6:] == 255).all(), "the ground"


def test_a_white_drawing_on_a_transparent_ground_stays_visible(tmp_path):
    logo(WHITE, WHITE).save(tmp_path / "a.png")
    image = decoded(tmp_path / "a.png")
    assert (image[10:22, 10:22] == 255).all() and (image[:6] == 0).all()


def test_half_transparent_pixels_are_mixed_with_the_ground(tmp_path):
    Image.new("RGBA", (40, 40), (200, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(decoded(tmp_path / "a.png").astype(int) - (227, 127, 127)).max() <= 1


def test_an_opaque_image_with_an_alpha_channel_keeps_its_colours(tmp_path):
    plain(WHITE, mode="RGBA").save(tmp_path / "a.png")
    assert (decoded(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("kind", ["TGA", "DDS", "ICO", "DIB"])
def test_an_opacity_that_was_never_set_does_not_hide_the_image(tmp_path, kind):
    """These formats have room for one, and some programs leave it at 0."""
    Image.new("RGBA", (64, 64), (*RED, 0)).save(tmp_path / "a.png", format=kind)
    assert np.abs(decoded(tmp_path / "a.png").astype(int) - RED).max() <= 2


def test_a_wholly_transparent_image_hides_its_colours(tmp_path):
    Image.new("RGBA", (64, 64), (*PINK, 0)).save(tmp_path / "a.png")
    assert (decoded(tmp_path / "a.png") == 255).all()


def exif_of(entries, extra=b""):
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + extra


def jpeg_with(app1):
    def write(path):
        plain(size=(64, 64)).save(path, format="JPEG", quality=95)
        whole = path.read_bytes()
        path.write_bytes(whole[:2] + b"\xff\xe1" + struct.pack(">H", len(app1) + 2) + app1 + whole[2:])

    return write


TURNED = (0x0112, 3, 1, b"\6\0\0\0")
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>\xa8\xb4\xe9 tiff:Orientation="1"</x:xmpmeta>'


def frames(kind, size=(64, 64)):
    return lambda path: plain(size=size).save(path, format=kind, save_all=True, append_images=[plain(BLUE, size)])


def ink(kind):
    plates = [Image.new("L", (64, 64), value) for value in (20, 230, 220, 30)]
    return lambda path: Image.merge("CMYK", plates).save(path, format=kind)


def long_text(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a" * 1_200_000, zip=True)
    plain().save(path, format="PNG", pnginfo=info)


def padded(path, kind):
    plain().save(path, format=kind)
    path.write_bytes(path.read_bytes() + b"SEFH" + bytes(200))


def planar_tiff(path, bits):
    """A red TIFF of 64 x 64 pixels in which all red values come first, then all green ones, then all blue ones."""
    data = b"".join(np.full(64 * 64, level << bits - 8, f"<u{bits // 8}").tobytes() for level in RED)
    size, end = len(data) // 3, 10 + 10 * 12 + 4
    counts, starts = end + 12, [end + 36 + n * size for n in range(3)]
    entries = [(256, 1, 64), (257, 1, 64), (258, 3, end), (259, 1, 1), (262, 1, 2), (273, 3, end + 24)]
    entries += [(277, 1, 3), (278, 1, 64), (279, 3, counts), (284, 1, 2)]
    head = b"II" + struct.pack("<HIH", 42, 8, len(entries))
    fields = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in entries)
    path.write_bytes(head + fields + bytes(4) + struct.pack("<9I", *[bits] * 3, *[size] * 3, *starts) + data)


SOUND_RED = {
    "palette": lambda path: plain().quantize(16).save(path, format="PNG"),
    "progressive JPEG": lambda path: plain().save(path, format="JPEG", progressive=True, quality=95),
    "16-bit RGB PNG": lambda path: png(path, [struct.pack(">192H", *[257 * c for c in RED] * 64)] * 64, 16, 2),
    "CMYK JPEG": ink("JPEG"),
    "CMYK TIFF": ink("TIFF"),
    "YCbCr TIFF": lambda path: plain(mode="YCbCr").save(path, format="TIFF"),
    "animated PNG": frames("PNG"),
    "animated GIF": frames("GIF"),
    "animated WebP": frames("WEBP"),
    "several pages": frames("TIFF"),
    "several images in a JPEG": frames("MPO", (640, 480)),
    "a long text": long_text,
    "JPEG with a trailer that ends in zeros": lambda path: padded(path, "JPEG"),
    "PNG with a trailer that ends in zeros": lambda path: padded(path, "PNG"),
    "8 bits in separate planes": lambda path: planar_tiff(path, 8),
    "XMP that is not UTF-8": jpeg_with(XMP),
    "the EXIF header twice": jpeg_with(b"Exif\0\0Exif\0\0" + exif_of([TURNED])),
    "an EXIF block of zeros": jpeg_with(b"Exif\0\0" + bytes(40)),
    "an empty EXIF block": jpeg_with(b"Exif\0\0"),
    "EXIF beyond the end": jpeg_with(b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "orientation as text": jpeg_with(b"Exif\0\0" + exif_of([(0x0112, 2, 2, b"6\0\0\0")])),
    "two orientations": jpeg_with(b"Exif\0\0" + exif_of([(0x0112, 3, 2, b"\6\0\6\0")])),
    "orientation 9": jpeg_with(b"Exif\0\0" + exif_of([(0x0112, 3, 1, b"\t\0\0\0")])),
    "a maker note as shorts": jpeg_with(b"Exif\0\0" + exif_of([TURNED, (0x927C, 3, 4, b"&\0\0\0")], bytes(16))),
    "a date as numbers": jpeg_with(b"Exif\0\0" + exif_of([TURNED, (0x0132, 12, 2, b"&\0\0\0")], bytes(16))),
    "5000×1": lambda path: plain(size=(5000, 1)).save(path, format="PNG"),
    "1×5000": lambda path: plain(size=(1, 5000)).save(path, format="PNG"),
    "1×1": lambda path: plain(size=(1, 1)).save(path, format="PNG"),
    "6000×40 JPEG": lambda path: plain(size=(6000, 40)).save(path, format="JPEG", quality=95),
}


@pytest.mark.parametrize("kind", SOUND_RED)
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_sound_image_of_any_kind_is_read(tmp_path, kind, name):
    """The content counts, not the name."""
    SOUND_RED[kind](tmp_path / name)
    assert np.abs(decoded(tmp_path / name).mean((0, 1)) - RED).max() < (25 if "CMYK" in kind else 4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_wrong_suffix_does_no_harm(tmp_path, kind):
    plain(size=(64, 64)).save(tmp_path / "a.jpg", format=kind)
    assert np.abs(decoded(tmp_path / "a.jpg").mean((0, 1)) - RED).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_upright(tmp_path, kind, orientation):
    pixels = np.zeros((480, 640, 3), np.uint8)
    pixels[:240], pixels[240:] = RED, BLUE
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # undoes what a viewer will do
    image = Image.fromarray(pixels) if back is None else Image.fromarray(pixels).transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a", format=kind, exif=exif)
    upright = decoded(tmp_path / "a").astype(int)
    assert np.abs(upright[:14] - RED).max() < 12 and np.abs(upright[18:] - BLUE).max() < 12


def test_the_middle_is_cropped_and_proportions_are_kept(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decoded(tmp_path / "wide.png", 64).mean() > 240


# --- what can't be decoded, and why ---


def damaged(kind, missing, **save):
    def write(path):
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=kind, **save)
        path.write_bytes(path.read_bytes()[:-missing])

    return write


def filled_up(kind, **save):
    """As a download that stopped leaves it: the right size, but zeros from the middle on."""

    def write(path):
        noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=kind, **save)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))

    return write


def huge(path):
    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def bytes_of(content):
    return lambda path: path.write_bytes(content)


HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64)
REFUSED = {
    "zero bytes": (bytes_of(b""), "is empty"),
    "HEIC": (bytes_of(HEIC), "is HEIC, which Pillow can't read: convert it"),
    "HEIC of another brand": (bytes_of(HEIC.replace(b"ftypheic", b"ftypmif1")), "is HEIC"),
    "video": (bytes_of(HEIC.replace(b"ftypheic", b"ftypmp42")), "is a video"),
    "web page": (bytes_of(b"<!doctype html><title>404</title>"), "is a web page"),
    "SVG": (bytes_of(b'<?xml version="1.0"?>\n<svg xmlns="x"/>'), "is an SVG drawing"),
    "text": (bytes_of(b"name,class\n1.jpg,red\n"), "is text"),
    "Git LFS": (bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "git lfs pull"),
    "PDF": (bytes_of(b"%PDF-1.7\n\xe2\xe3"), "is a document or an archive"),
    "JPEG XL": (bytes_of(b"\0\0\0\x0cJXL \r\n\x87\n"), "is JPEG XL"),
    "noise": (bytes_of(bytes(range(255, 0, -1))), "is no image that Pillow knows"),
    "truncated JPEG": (damaged("JPEG", 4000, quality=90), "is truncated"),
    "truncated PNG": (damaged("PNG", 40000), "is truncated"),
    "truncated BMP": (damaged("BMP", 4000), "is truncated"),
    "truncated TIFF": (damaged("TIFF", 4000), ""),
    "truncated GIF": (damaged("GIF", 4000), "is truncated"),
    "truncated WebP": (damaged("WEBP", 4000), ""),
    "truncated AVIF": (damaged("AVIF", 4000), ""),
    "JPEG filled up with zeros": (filled_up("JPEG", quality=90), "is truncated"),
    "PNG filled up with zeros": (filled_up("PNG"), "copy it again"),
    "12 bits in 16 of each colour": (
        lambda path: png(path, [struct.pack(">192H", *range(0, 3840, 20))] * 64, 16, 2),
        "colours of 12 bits or less in 16",
    ),
    "16 bits in separate planes": (lambda path: planar_tiff(path, 16), "colours of 16 bits in separate planes"),
    "damaged TIFF": (bytes_of(b"II*\0" + bytes(60)), "of a kind that Pillow can't read, or damaged"),
    "text with a byte-order mark": (bytes_of(b"\xef\xbb\xbfname,class\n"), "is text"),
    "200 megapixels": (huge, "has 200 megapixels, and Pillow's limit is 179: shrink it"),
    "link that leads nowhere": (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
    "link to itself": (lambda path: path.symlink_to(path), "is a link that leads nowhere"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["photo.jpg", "photo.PNG"])
def test_a_refused_image_is_named_with_the_reason(root, kind, name):
    write, reason = REFUSED[kind]
    path = root / "train" / "red" / name
    write(path)
    assert listed(root)[0] == with_red(train=4), "it may not be passed over in silence"
    images, kept, refused = _sources.decode([str(root / "train/red/0.png"), str(path)], 32)
    assert kept == [0] and len(images) == 1
    sentence = refused[str(path)]
    assert sentence.startswith(f"The image {path} ") and reason in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("name", ["a.heic", "b.HEIF"])
def test_heic_is_not_passed_over(root, name):
    (root / "train/red" / name).write_bytes(HEIC)
    assert listed(root)[0] == with_red(train=4)


# --- what is drawn ---


def test_drawn_images_are_in_proportion_and_the_same_each_time():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    chosen = _sources.draw(labels, np.arange(143), share=0.2)
    assert np.bincount(labels[chosen]).tolist() == [20, 8, 1]
    assert np.array_equal(chosen[::-1], _sources.draw(labels[::-1], np.arange(143)[::-1], share=0.2))


def test_equal_images_are_drawn_together():
    labels = np.repeat([0, 1], 60)
    ids = np.concatenate([np.arange(60) // 3, 100 + np.arange(60) // 2])
    chosen = _sources.draw(labels, ids, share=0.25)
    assert not set(ids[chosen]) & set(ids[~chosen])
    assert all(12 <= count <= 18 for count in np.bincount(labels[chosen]))


def test_single_images_are_drawn_before_many_equal_ones():
    ids = np.array([7] * 90 + list(range(100, 112)))
    chosen = _sources.draw(np.zeros(102, int), ids, share=0.1)
    assert chosen.sum() == 10 and 7 not in ids[chosen]


def test_nothing_is_drawn_from_a_class_with_one_image_however_often_it_is_there():
    labels, ids = np.array([0, 0, 0, 1, 1]), np.array([5, 5, 5, 6, 7])
    chosen = _sources.draw(labels, ids, share=0.2)
    assert labels[chosen].tolist() == [1]


def test_an_image_in_two_classes_stays_on_one_side():
    labels, ids = np.array([0, 1] + [0] * 9 + [1] * 9), np.array([1, 1, *range(10, 28)])
    for share in (0.1, 0.5, 0.9):
        chosen = _sources.draw(labels, ids, share)
        assert chosen[0] == chosen[1] and 0 < chosen.sum() < 20
