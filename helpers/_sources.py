"""Where the images come from: the digits inside scikit-learn, CIFAR-10, or a folder of one's own."""

import contextlib
import io
import os
import re
import stat
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.fs
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from helpers.preprocessing import image_ids
from helpers.settings import DEFAULT_STORAGE, Settings, hide_secret, join

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = dict(zip(SPLITS, SPLITS, strict=True)) | {"training": "train", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "dev"), "validation")
# Such as `seg_train`, `Training Set` or `test_images-1`; several of them are not classes, but splits by other names.
LIKE_A_SPLIT = re.compile(
    rf"(?:.*[^a-z])?({'|'.join(SPLIT_NAMES)})(?:[^a-z].*|(?:data)?(?:sets?|images?|imgs?|dir)?[^a-z]*)",
    re.IGNORECASE | re.DOTALL,
)

# All that Pillow opens, and HEIC images, which it can't open and which are refused by name.
Image.preinit()  # the usual formats first, or Pillow would try twenty others before JPEG
NO_IMAGES = ("BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF")
SUFFIXES = {".heic", ".heif"} | {end for end, kind in Image.registered_extensions().items() if kind not in NO_IMAGES}

# Hidden files and folders, and what systems and network drives leave behind.
HIDDEN = re.compile(
    r"\..*|(eh)?thumbs\.db|desktop\.ini|icon\r|__macosx|__pycache__|lost\+found|found\.\d{3}|lost\.dir|(?-i:RECYCLE[RD])|"
    r"\$recycle\.bin|system volume information|network trash folder|temporary items|"
    r"[@#](eadir|tmp|(recently-)?snapshot|recycle|__thumb)",
    re.IGNORECASE | re.DOTALL,
)

# Why Pillow does not know a file, by the bytes that it begins with.
REASONS = {
    rb"\Z": "is empty: copy it again or delete it",
    rb".{4}ftyp(hei|hev|hif|mif1|msf1)": "is HEIC, which Pillow can't read: convert it to JPEG or PNG",
    rb".{4}JXL |\xff\x0a": "is JPEG XL, which Pillow can't read: convert it to JPEG or PNG",
    rb".{4}ftyp(?!avi|crx)|.{4}moov|\x1aE\xdf\xa3|RIFF.{4}AVI ": "is a video: delete it or export its frames",
    rb"version https://git-lfs": "is only a pointer to a file in Git LFS: fetch it with `git lfs pull`",
    rb"\s*(<\?xml.*)?<svg": "is an SVG drawing, which Pillow can't read: export it as PNG",
    rb"(\xef\xbb\xbf)?\s*<": "is a web page, not an image: download it again or delete it",
    rb"II[*+]\0|MM\0[*+]|\xff\xd8\xff|8BPS|.{128}DICM": "is of a kind that Pillow can't read, or damaged: "
    "convert it to PNG or copy it again",
    rb"%PDF|PK\x03\x04|\x1f\x8b|Rar!": "is a document or an archive, not an image: delete it",
    rb"(\xef\xbb\xbf)?[\t\n\r -~\x80-\xf4]+\Z": "is text, not an image: delete it",
    rb"": "is no image that Pillow knows, or its beginning is damaged: copy it again or delete it",
}

# What the end of a whole file contains, by its format; a trailer may follow.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

# Drawing programs store long texts in a PNG. Pillow would refuse an image with a text of more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class DataError(ValueError):
    """A data source can't be used; the message says what is wrong and what to do."""

    def __init__(self, sentence: str):
        super().__init__(hide_secret(printable(sentence)))


def digits() -> dict:
    """Return `class_names` and, for each split, uint8 (count, 8, 8, 3) and int64 (count,): 1,260, 180, 357 digits."""
    # Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images = np.repeat((scans.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    train, test = train_test_split(np.arange(len(images)), test_size=357, stratify=scans.target, random_state=0)
    source = {"test": (images[test], scans.target[test]), "class_names": [str(digit) for digit in range(10)]}
    return source | _with_validation(images[train], scans.target[train], share=1 / 8)


def cifar10(cfg: Settings) -> dict:
    """Return CIFAR-10 as `digits` does: 45,000, 5,000 and 10,000 images of 32×32 pixels in a fixed random order."""
    # Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import extract_archive

    source = {}
    with tempfile.TemporaryDirectory() as unpacked:
        extract_archive(cifar10_archive(cfg), unpacked)
        for split in ("train", "test"):
            part = CIFAR10(unpacked, train=split == "train")
            order = np.random.default_rng(0).permutation(len(part.data))
            source[split] = (part.data[order], np.asarray(part.targets)[order])
        source["class_names"] = part.classes
    return source | _with_validation(*source["train"], share=1 / 10)


def cifar10_archive(cfg: Settings) -> str:
    """Return the path of a sound CIFAR-10 archive: the learner's, or the data folder's, downloaded; or DataError."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url

    root = cfg.storage if "://" not in cfg.storage else str(DEFAULT_STORAGE)
    archive = Path(cfg.cifar10_archive or Path(root, "data", CIFAR10.filename))
    if not archive.exists():
        print(f"Downloading CIFAR-10 (170 MB) to {archive}; an archive that you have can go there instead.")
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as beside:
            try:
                download_url(CIFAR10.url, beside, CIFAR10.filename, CIFAR10.tgz_md5)
            except Exception as error:
                raise DataError(
                    f"CIFAR-10 could not be downloaded ({error}). Put {CIFAR10.filename} from another machine into "
                    f"{archive.parent}, or name it in TUTORIAL_CIFAR10_ARCHIVE, or go on with TUTORIAL_DATA=digits."
                ) from error
            Path(beside, CIFAR10.filename).replace(archive)
    if not check_integrity(archive, CIFAR10.tgz_md5):
        what = f"{archive} is not the whole archive (it has {archive.stat().st_size:,} bytes)"
        raise DataError(f"{what}: delete it or put a whole copy there.")
    return str(archive)


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Return uint8 (count, size, size, 3), in a temporary file if images are resized, since they may be large."""
    if images.shape[1] == size:
        return images
    resized = np.memmap(tempfile.TemporaryFile(), np.uint8, shape=(len(images), size, size, 3))
    for image, place in zip(images, resized, strict=True):
        place[:] = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return resized


def draw(labels: np.ndarray, ids: np.ndarray, share: float) -> np.ndarray:
    """Choose `share` of each class, and at least one image if the class has two different ones: bool (count,)."""
    # The content hashes `ids` (count,) decide: equal images are chosen together or not at all, in any order the same.
    equal = defaultdict(list)
    for index in np.argsort(ids).tolist():
        equal[ids[index]].append(index)
    groups = [(indices, set(labels[indices].tolist())) for indices in sorted(equal.values(), key=len)]
    left = Counter(label for _, classes in groups for label in classes)
    wanted = np.maximum(1, np.diff(np.round(np.cumsum(np.bincount(labels)) * share), prepend=0))
    chosen = np.zeros(len(labels), bool)
    for indices, classes in groups:
        if all(wanted[label] > 0 and left[label] > 1 for label in classes):
            chosen[indices] = True
            left.subtract(classes)
            np.subtract.at(wanted, labels[indices], 1)
    return chosen


def list_folder(folder: str) -> tuple[list[tuple], list[str]]:
    """List split, class name, path, bytes and time of change of each image; return also notes on what is left out."""
    # They are in `<split>/<class>/**/*`, or in `<class>/**/*`, which then is all for training.
    passed_over, found, notes = Counter(), {}, []
    _, below, loose = next(_walk(folder, passed_over))
    splits = {name: SPLIT_NAMES[name.lower()] for name in below if name.lower() in SPLIT_NAMES}
    if splits:
        others = [name for name in below if name not in splits]
        passed_over[f"folder that is no split ({', '.join(others[:3])})"] = len(others)
        passed_over["image outside a class folder"] = len(loose)
    else:
        splits, passed_over = {".": "train"}, Counter()
        alike = {SPLIT_NAMES[match[1].lower()]: name for name in below if (match := LIKE_A_SPLIT.fullmatch(name))}
        if "train" in alike and len(alike) > 1:
            what = f"{folder} has folders that look like splits ({', '.join(sorted(alike.values()))})"
            raise DataError(f"{what}: rename them train, validation, test.")
    if len(set(splits.values())) < len(splits):
        raise DataError(f"{folder} has two folders for one split among {', '.join(splits)}: put all into one of them.")
    if "train" not in splits.values():
        raise DataError(f"{folder} has no folder train/: put the images for training into train/<class>/.")
    for name, split in sorted(splits.items(), key=lambda item: SPLITS.index(item[1])):
        classes = found.setdefault(split, defaultdict(list))
        place, inside = folder if name == "." else join(folder, name), {}
        for parts, below, images in _walk(place, passed_over):
            if len(parts) == 1:
                inside[parts[0]] = tuple(below)
            if {"train", "training"} & {part.lower() for part in parts[1:2]}:
                remedy = "set TUTORIAL_DATA to it, or fill train/<class>/."
                raise DataError(f"{join(place, parts[0])} has a folder train/: {remedy}")
            if parts:
                classes[unicodedata.normalize("NFC", printable(parts[0]))] += images
            else:
                passed_over["image outside a class folder"] += len(images)
        if len(inside) > 1 and len(set(inside.values())) == 1 and len(same := next(iter(inside.values()))) > 1:
            notes.append(f"All classes in {place} have the folders {', '.join(same[:3])}, read as one: is that right?")
        if len(inside) == 1 and LIKE_A_SPLIT.fullmatch(only := next(iter(inside))) and len(inside[only]) > 1:
            what = f"{join(place, only)} holds the class folders {', '.join(inside[only][:3])}"
            raise DataError(f"{what}: move them up into {place}.")
        if not classes:
            raise DataError(f"{place} has no class folders: sort its images into {name}/<class>/, or move it away.")
        if empty := sorted(class_name for class_name, images in classes.items() if not images):
            what = f"{join(place, empty[0])} holds no image that Pillow reads, by the suffixes of its files"
            raise DataError(f"{what}: add some, rename them (.png, .jpg …), or move the folder away.")
        if strange := sorted(classes.keys() - found["train"].keys()):
            raise DataError(f"{place} has the class {strange[0]}, and train has not: add it there, or remove it here.")
        if lacking := sorted(found["train"].keys() - classes.keys()):
            notes.append(f"{split} has no image of {', '.join(lacking[:3])}{' …' if lacking[3:] else ''}.")
    if len(only := list(found["train"])) < 2:
        raise DataError(f"{folder} has one class, {only[0]}, and needs two. Are they in it? Set TUTORIAL_DATA to it.")
    if len(kinds := +passed_over) > 12:
        kinds = Counter(dict(kinds.most_common(11)))
        kinds["of other kinds"] = (+passed_over).total() - kinds.total()
    if counted := ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items())):
        notes.append(f"Passed over in {folder}: {counted}.")
    listing = [(split, name, *image) for split in found for name, images in found[split].items() for image in images]
    return sorted(listing, key=lambda image: image[:3]), [printable(note) for note in notes]


def _walk(folder: str, passed_over: Counter):
    """Yield folders, links followed, as `os.walk` does, but their place below `folder` and only visible images."""
    walk, get_status = os.walk(folder, followlinks=True, onerror=_stop), os.stat
    if "://" in folder:
        walk, get_status, folder = _open_bucket(folder)
    for parent, below, names in walk:
        images = []
        hidden = {name for name in below + names if HIDDEN.fullmatch(name)}
        passed_over["hidden or system file or folder"] += len(hidden)
        below[:] = sorted(set(below) - hidden)
        for path in (Path(parent, name) for name in below):
            if path.is_symlink() and any(above.resolve().is_relative_to(path.resolve()) for above in path.parents):
                raise DataError(f"The link {path} leads back to a folder that it is in: remove it.")
        for name in sorted(set(names) - hidden):
            path, suffix, status = os.path.join(parent, name), os.path.splitext(name)[1].lower(), None
            try:
                status = get_status(path)
            except OSError as error:
                if suffix not in SUFFIXES:
                    _stop(error)
            if suffix not in SUFFIXES or (status and not stat.S_ISREG(status.st_mode)):
                passed_over[f"{suffix} file" if suffix else "file without a suffix"] += 1
            else:  # one without a status is refused when it is to be decoded
                changed = status and max(status.st_mtime_ns, status.st_ctime_ns)  # a file that is moved keeps the first
                images.append((path, status and status.st_size, changed))
        yield Path(parent).relative_to(folder).parts, below, images


def _open_bucket(uri: str) -> tuple:
    """Return what walks over a folder in a bucket as `os.walk` does, what replaces `os.stat` there, and its path."""
    known = {}

    def walk(parent: str):
        below, names = [], []
        for entry in filesystem.get_file_info(pyarrow.fs.FileSelector(parent)):
            (below if entry.type == pyarrow.fs.FileType.Directory else names).append(entry.base_name)
            known[entry.path] = SimpleNamespace(st_mode=stat.S_IFREG, st_size=entry.size)
            known[entry.path].st_mtime_ns = known[entry.path].st_ctime_ns = entry.mtime_ns
        yield parent, below, names
        for name in below:
            yield from walk(f"{parent}/{name}")

    filesystem, root = pyarrow.fs.FileSystem.from_uri(uri)
    return walk(root.rstrip("/")), known.__getitem__, root.rstrip("/")


def _stop(error: OSError):
    raise DataError(f"{error.filename} {_trouble(error.filename, error)}") from error


def decode(paths: Iterable[str], size: int, source: str = "") -> tuple[np.ndarray, list[int], dict[str, str]]:
    """Return uint8 (count, size, size, 3) cropped in the middle, the images' indices, and what is wrong with others."""
    images, refused = {}, {}
    filesystem = pyarrow.fs.FileSystem.from_uri(source)[0] if "://" in source else None
    for index, path in enumerate(paths):
        content = b""
        try:
            content = filesystem.open_input_stream(path).read() if filesystem else Path(path).read_bytes()
            images[index] = decode_file(io.BytesIO(content), size)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            refused[path] = printable(f"The image {path} {_trouble(path, error, content)}")
    return np.array(list(images.values()), np.uint8).reshape(-1, size, size, 3), list(images), refused


def printable(text: str) -> str:
    """Return `text` in one line, with escapes for line breaks and for bytes of file names that are not UTF-8."""
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def decode_file(file: io.BytesIO, size: int) -> np.ndarray:
    """Return the image in an open file as uint8 (size, size, 3); Pillow's errors when it is damaged."""
    with Image.open(file) as image:
        image.draft("RGB", (size, size))  # lets a JPEG be decoded at a fraction of its size
        tags, is_coloured = getattr(image, "tag_v2", {}), image.mode in ("RGB", "RGBA", "LA")
        is_deep = is_coloured and image.format in ("PNG", "TIFF") and ";16" in str(image.tile)
        if tags.get(284) == 2 and tags.get(259, 1) == 1 and len(tags.get(258, ())) > 1 and max(tags[258]) > 8:
            raise OSError("colours of 16 bits in separate planes, which Pillow mixes up")
        image.load()
        if is_deep and 0 < max(high for _, high in image.convert("RGB").getextrema()) < 16:
            raise OSError("colours of 12 bits or less in 16, of which Pillow keeps 8")
        lacks_opacity = image.format in ("BMP", "CUR", "DDS", "DIB", "ICO", "TGA")  # room for it, which may be left 0
        if image.format in ENDS and (whole := file.getvalue()).endswith(bytes(64)):
            last_scan = 0 if image.format == "PNG" else whole.rfind(b"\xff\xda")
            if ENDS[image.format] not in whole[last_scan:]:
                raise OSError("truncated, and filled up with zeros")
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _to_eight_bits(image)
        with contextlib.suppress(Exception):  # a sound image can have a damaged EXIF block
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "RGB" or image.has_transparency_data:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            if lacks_opacity and image.mode == "RGBA" and not image.getchannel("A").getbbox():
                image = image.convert("RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        if image.mode == "RGB":
            return np.asarray(image)
        pixels = np.asarray(image, np.float32)
    colours, alpha = pixels[..., :3], pixels[..., 3:] / 255
    drawn = (colours * alpha).sum() / max(3 * alpha.sum(), 1e-9)
    ground = 0 if drawn > 215 else 255  # black where the drawing is nearly white itself
    return (colours * alpha + ground * (1 - alpha)).round().astype(np.uint8)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey values by the smallest usual range that holds them; where none does, from least to most."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    if tags and image.mode == "I" and tags.get(339, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow takes all 32 bits for signed
    if image.format == "FITS" and image.mode == "I;16":
        values = values.view(np.int16)  # Pillow takes them for unsigned
    values = values.astype(np.float32)  # floats of 64 bits need 2 GB for 80 megapixels
    sound = np.abs(values) < 1e30  # neither NaN nor what stands for it
    with contextlib.suppress(TypeError, ValueError):
        sound &= values != float(tags.get(42113))  # GDAL's "no data"
    low, high = (values[sound].min(), values[sound].max()) if sound.any() else (0, 0)
    tops, slack = (255, 1023, 4095, 16383, 65535), 0  # 10, 12 and 14 bits are stored in 16, unsaid
    if image.mode == "F":  # resampling goes beyond the range a little
        tops, slack = [1, *(top for top in (255, 4095, 65535) if high > top / 4)], 0.1  # metres and kelvins have none
    elif not (values % 257).any():
        tops = [65535]  # 8 bits that a program has written as 16
    low, high = next(((0, top) for top in tops if -slack * top <= low and high <= (1 + slack) * top), (low, high))
    grey = ((np.where(sound, values, low) - low) * (255 / max(high - low, 1e-9))).clip(0, 255).round().astype(np.uint8)
    if tags.get(262) == 0:  # a TIFF in which 0 is white: Pillow heeds it up to 8 bits
        grey = 255 - grey
    scaled = Image.fromarray(grey)
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return scaled


def _trouble(path: str, error: Exception, content: bytes = b"") -> str:
    """Return the end of a sentence: why `path`, which has this content, can't be read, and the remedy."""
    if isinstance(error, Image.DecompressionBombError):
        pixels, limit = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
        return f"has {pixels:.0f} megapixels, and Pillow's limit is {limit:.0f}: shrink it."
    if isinstance(error, OSError) and error.errno:
        if os.path.islink(path) and not os.path.exists(path):
            return "is a link that leads nowhere: repair or remove it."
        return f"can't be read ({error.strerror}): change its permissions, or move it elsewhere."
    if isinstance(error, UnidentifiedImageError):
        start, flags = content[:512], re.DOTALL | re.IGNORECASE
        return next(why for begin, why in REASONS.items() if re.match(begin, start, flags)) + "."
    what = "is truncated" if "truncated" in str(error) else "can't be decoded"
    return f"{what} ({error}): copy it again, convert it or delete it."


def _with_validation(images: np.ndarray, labels: np.ndarray, share: float) -> dict:
    chosen = draw(labels, image_ids(images), share)
    return {"train": (images[~chosen], labels[~chosen]), "validation": (images[chosen], labels[chosen])}
