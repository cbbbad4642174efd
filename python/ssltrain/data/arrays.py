# SPDX-License-Identifier: Apache-2.0
"""Sources that are arrays: digits, idx folders (MNIST), CIFAR-10 folders, ``.npz`` files."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssltrain.data.files import range_note
from ssltrain.data.fingerprint import hash_images, split
from ssltrain.data.pixels import Extent, choose_range, extent, to_bytes
from ssltrain.data.types import UNLABELLED, ArrayImages, DataOptions, ImageData, Part
from ssltrain.errors import UserError

BLOCK = 256  # images that are scaled at a time


class Raw(NamedTuple):
    """What a file holds of one part: images in any layout; labels and captions if there are any."""

    images: np.ndarray
    labels: np.ndarray | None
    captions: np.ndarray | None = None


def _assemble(
    name: str,
    kind: str,
    train: Raw,
    test: Raw | None,
    options: DataOptions,
    names: list[str] | None = None,
) -> ImageData:
    """An ``ImageData`` of arrays [N, H, W], [N, H, W, C] or [N, C, H, W], and labels.

    Args:
        name: of the data set.
        kind: of the source.
        train: the training part, or everything.
        test: the test part; None to set one aside.
        options: how the source is read.
        names: of the classes, where labels are places in a list; else the values name them.
    """
    raws = [train] if test is None else [train, test]
    pixels, pixel_range, notes = _bytes([_ordered(raw.images, name) for raw in raws], options, name)
    if pixels[-1].shape[1:] != pixels[0].shape[1:]:
        raise UserError(f"{name}: the test images have another size than the training images")
    given = [_labels(raw, name) for raw in raws]
    class_names, labels, more = _classes(given, [len(raw.images) for raw in raws], names)
    parts = [
        (array, own, hash_images(array), _captions(raw, name))
        for array, own, raw in zip(pixels, labels, raws, strict=True)
    ]
    if test is None:
        array, own, hashes, texts = parts[0]
        how = "stratified" if kind == "digits" else options.split  # digits never change
        parts = [
            (array[r], own[r], hashes[r], None if texts is None else texts[r])
            for r in split(hashes, own, how)
        ]
    channels, height, width = pixels[0].shape[1:]
    size = (height, width)
    if options.image_size and size != (options.image_size,) * 2:
        size = (options.image_size,) * 2
        parts = [(_resize(a, options.image_size), own, h, texts) for a, own, h, texts in parts]
    made = [
        Part(
            ArrayImages(array),
            own,
            hashes,
            np.zeros(len(own), np.int64),
            _title(place),
            None if texts is None else texts.tolist(),
        )
        for place, (array, own, hashes, texts) in zip(("training", "test"), parts, strict=True)
    ]
    return ImageData(
        name, kind, made[0], made[1], channels, size, class_names, notes + more, pixel_range
    )


def _title(place: str) -> Any:
    return lambda row: f"{place} image {row}"


def _ordered(images: np.ndarray, name: str) -> np.ndarray:
    """The images as [N, C, H, W] with 1, 3 or 4 channels, of any number type."""
    if images.dtype.kind not in "buif":
        raise UserError(f"{name}: images must be numbers, got {images.dtype}")
    shape = list(images.shape)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and shape[1] not in (1, 3, 4) and shape[3] in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or 0 in images.shape[2:]:
        raise UserError(
            f"{name}: images must have the shape [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 "
            f"or 4 channels, got {shape}"
        )
    return images


def _bytes(
    arrays: list[np.ndarray], options: DataOptions, name: str
) -> tuple[list[Tensor], str, list[str]]:
    """Arrays of any type as uint8 [N, C, H, W] with 1 or 3 channels, and the range they had."""
    try:
        deep = [_extent(array) for array in arrays if array.dtype not in (np.uint8, np.bool_)]
        chosen, notes = options.pixel_range, []
        if deep:
            whole = deep[0].join(deep[-1])
            chosen = choose_range(whole, chosen)
            if options.pixel_range == "auto":
                notes = range_note(sum(map(len, arrays)), whole, chosen)
        return [_opaque(_scaled(array, chosen), options) for array in arrays], chosen, notes
    except UserError as error:
        raise UserError(f"{name} {error}") from error


def _extent(array: np.ndarray) -> Extent:
    """``extent``, whose error names the first image at fault."""
    try:
        return extent(array)
    except UserError as error:
        row = next(i for i, image in enumerate(array) if not np.isfinite(image).all())
        raise UserError(f"{error} (first in image {row} of {len(array)})") from error


def _scaled(array: np.ndarray, pixel_range: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    scaled = np.empty(array.shape, np.uint8)
    # "image" is the range of each image; the others are scaled in blocks to save memory.
    block = 1 if pixel_range == "image" else BLOCK
    for begin in range(0, len(array), block):
        scaled[begin : begin + block] = to_bytes(array[begin : begin + block], pixel_range)
    return scaled


def _opaque(images: np.ndarray, options: DataOptions) -> Tensor:
    """Images as a tensor; those of four channels (RGBA) laid on the background."""
    if images.shape[1] == 4:
        from PIL import ImageColor

        colour = np.array(ImageColor.getrgb(options.background)[:3], np.uint8)
        flat = np.empty((len(images), 3, *images.shape[2:]), np.uint8)
        for begin in range(0, len(images), BLOCK):
            block = images[begin : begin + BLOCK].astype(np.float32)
            alpha = block[:, 3:] / 255
            mixed = block[:, :3] * alpha + colour[:, None, None] * (1 - alpha)
            flat[begin : begin + BLOCK] = np.rint(mixed)
        images = flat
    # np.frombuffer gives read-only arrays, which torch does not take.
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _resize(images: Tensor, size: int) -> Tensor:
    resized = [
        torch.nn.functional.interpolate(
            block.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for block in images.split(BLOCK)
    ]
    return torch.cat(resized)


def _labels(raw: Raw, name: str) -> np.ndarray | None:
    """The labels of a part as they are: integers or words, one an image."""
    if raw.labels is None:
        return None
    labels = np.asarray(raw.labels).reshape(-1)
    if labels.dtype.kind not in "biuUS" or len(labels) != len(raw.images):
        raise UserError(
            f"{name}: labels must be one integer or word an image, got {len(labels)} of type "
            f"{labels.dtype} for {len(raw.images)} images"
        )
    return labels


def _captions(raw: Raw, name: str) -> np.ndarray | None:
    """The captions of a part, str [N], or None."""
    if raw.captions is None:
        return None
    if raw.captions.dtype.kind != "U" or raw.captions.shape != (len(raw.images),):
        raise UserError(
            f"{name}: captions must be one text an image, got {list(raw.captions.shape)} of type "
            f"{raw.captions.dtype} for {len(raw.images)} images"
        )
    return raw.captions


def _classes(
    parts: list[np.ndarray | None], counts: list[int], names: list[str] | None
) -> tuple[list[str], list[np.ndarray], list[str]]:
    """Names of the classes; the class of each image of each part, -1 without one; notes.

    A class is a value that occurs, whatever its size. -1 and the empty word are no class.
    """
    given = [labels for labels in parts if labels is not None]
    if not given:
        return [], [np.full(count, UNLABELLED) for count in counts], []
    together = np.concatenate(given)
    nothing = "" if together.dtype.kind == "U" else b"" if together.dtype.kind == "S" else -1
    values = np.unique(together)
    missing = values == nothing
    values = values[~missing]
    rows = []
    for labels, count in zip(parts, counts, strict=True):
        found = np.full(count, UNLABELLED)
        if labels is not None:
            known = labels != nothing
            found[known] = np.searchsorted(values, labels[known])
        rows.append(found)
    notes = []
    if missing.any():
        count = int(np.count_nonzero(together == nothing))
        shown = repr(nothing) if isinstance(nothing, str | bytes) else str(nothing)
        notes.append(f"{count} images have the label {shown}, which means that they have none")
    titles = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
    if names is not None:  # labels are places in a list; a place beyond it keeps its number
        titles = [names[v] if 0 <= v < len(names) else str(v) for v in values.tolist()]
    return titles, rows, notes


def load_digits(options: DataOptions) -> ImageData:
    """The digits of scikit-learn: 1797 images of 8 x 8."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    return _assemble("digits", "digits", Raw(images, digits.target), None, options)


def _open(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


# A byte of deflate can't stand for more.
_MOST_INFLATED = 1032


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, as MNIST uses them, plain or gzipped.

    No more is read than its header promises, and no header is believed that promises more than a file of
    its length can hold.

    Raises:
        UserError: the file is not idx, holds another type, or is cut short.
    """
    zipped = path.suffix == ".gz"
    try:
        length = path.stat().st_size
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8:
                raise UserError(f"{path} is not an idx file of unsigned bytes")
            sizes = file.read(4 * head[3])
            shape = struct.unpack(f">{len(sizes) // 4}I", sizes[: len(sizes) // 4 * 4])
            promised = math.prod(shape)
            if len(shape) != head[3] or promised > length * (_MOST_INFLATED if zipped else 1):
                raise UserError(f"{path} is cut short; download it again")
            body = file.read(promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(body) < promised:
        raise UserError(f"{path} is cut short; download it again")
    if len(body) > promised:
        raise UserError(f"{path} holds more than its header says; download it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def load_idx_folder(folder: Path, options: DataOptions) -> ImageData:
    """A folder in MNIST's format; the labels of both parts may be missing."""

    def find(part: str, what: str, dims: int) -> Path | None:
        names = [f"{part}-{what}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        return next((folder / name for name in names if (folder / name).is_file()), None)

    def read(part: str, labelled: bool) -> Raw:
        images, labels = find(part, "images", 3), find(part, "labels", 1)
        if images is None:
            raise UserError(f"{folder} has no {part}-images-idx3-ubyte (or .gz)")
        if labels is None and labelled:
            raise UserError(f"{folder} has no {part}-labels-idx1-ubyte (or .gz)")
        return Raw(read_idx(images), read_idx(labels) if labels else None)

    labelled = any(find(part, "labels", 1) for part in ("train", "t10k"))
    train, test = (read(part, labelled) for part in ("train", "t10k"))
    return _assemble(folder.name, "mnist", train, test, options)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR-10's files hold and refuses everything else: a pickle can run code."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def load_cifar10(folder: Path, options: DataOptions) -> ImageData:
    """A folder of CIFAR-10's batches, as pickles or as binary files."""

    def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
        binary = folder / f"{name}.bin"
        if binary.is_file():
            rows = np.frombuffer(_open(binary), np.uint8)
            if rows.size == 0 or rows.size % 3073:
                raise UserError(
                    f"{binary} is not a CIFAR-10 batch: its size is no multiple of 3073"
                )
            rows = rows.reshape(-1, 3073)
            return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
        if not (folder / name).is_file():
            raise UserError(f"{folder} has neither {name} nor {name}.bin; unpack CIFAR-10 there")
        try:
            content = _ArraysOnly(io.BytesIO(_open(folder / name)), encoding="bytes").load()
            images = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32)
            return images, np.asarray(content[b"labels"])
        except (pickle.UnpicklingError, KeyError, ValueError, EOFError, TypeError) as error:
            raise UserError(f"{folder / name} is not a CIFAR-10 batch: {error}") from error

    names = [f"data_batch_{i}" for i in range(1, 6)]
    present = [n for n in names if (folder / n).is_file() or (folder / f"{n}.bin").is_file()]
    batches = [batch(name) for name in present or names]
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    class_names = None
    if (folder / "batches.meta.txt").is_file():
        class_names = (folder / "batches.meta.txt").read_text().split()
    test = Raw(*batch("test_batch"))
    return _assemble(folder.name, "cifar10", Raw(images, labels), test, options, class_names)


# Names of image and label arrays seen in published .npz files, the usual ones first.
_NPZ_SPLIT = (
    (("x_train", "y_train", "captions_train"), ("x_test", "y_test", "captions_test")),
    (
        ("train_images", "train_labels", "train_captions"),
        ("test_images", "test_labels", "test_captions"),
    ),
)
_NPZ_WHOLE = (
    ("images", "labels", "captions"),
    ("x", "y", "captions"),
    ("X", "y", "captions"),
    ("data", "labels", "captions"),
    *(train for train, _ in _NPZ_SPLIT),
)


def load_npz(path: Path, options: DataOptions) -> ImageData:
    """Arrays of an ``.npz`` file: of two parts, or of one that is split."""
    try:
        # Opened here: np.load leaves a file open when what is in it is no zip archive.
        with path.open("rb") as file:
            return _read_npz(path, file, options)
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(
            f"cannot read {path}: it is no .npz file, or was cut short or damaged ({error})"
        ) from error
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        MemoryError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _refuse_a_header_that_lies(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """NumPy would ask for the memory of 2^40 images before it finds that they are not there."""
    member = archive.getinfo(name if name.endswith(".npy") else f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            return
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else (np.lib.format.read_array_header_2_0)
        )
        shape, _, dtype = read(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > member.file_size:
        raise UserError(f"cannot read {path}: {name} holds less than its header says")


def _read_npz(path: Path, file: Any, options: DataOptions) -> ImageData:
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path} holds one array without a name; save it with np.savez(images=...)")

    def array(name: str) -> np.ndarray:
        if archive.zip is not None:  # it is open
            _refuse_a_header_that_lies(path, archive.zip, name)
        found: np.ndarray = archive[name]
        return found

    def part(names: tuple[str, str, str]) -> Raw:
        images, *others = names
        labels, captions = (array(other) if other in archive else None for other in others)
        return Raw(array(images), labels, captions)

    for train, test in _NPZ_SPLIT:
        if train[0] in archive and test[0] in archive:
            return _assemble(path.stem, "npz", part(train), part(test), options)
    for whole in _NPZ_WHOLE:
        if whole[0] in archive:
            return _assemble(path.stem, "npz", part(whole), None, options)
    raise UserError(
        f"{path} has the arrays {', '.join(archive.files) or 'none'}; name them images and labels "
        "(and captions), or x_train, y_train, x_test and y_test"
    )
