# SPDX-License-Identifier: Apache-2.0
"""Data sources: digits, idx folders (MNIST), CIFAR-10 folders, ``.npz`` files, image folders.

Every source becomes an ``ImageData``: uint8 images of one size, a training and a test part, and
labels where there are any. Labels are used by the evaluation only.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ssltrain.errors import UserError

TEST_SHARE = 0.2  # of the images, where a source has no test part of its own
SPLIT_SEED = 0  # the same split in every run, whatever its seed
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
FOLDER_IMAGE_SIZE = 64  # pixels a side when an image folder gets no --image-size
DECODE_THREADS = 4


class Images(Protocol):
    """Images of one size that can be read by index."""

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (int64 [B]) as uint8 [B, C, H, W]."""
        ...


@dataclass
class ArrayImages:
    """Images held in memory: uint8 [N, C, H, W]."""

    array: Tensor

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Tensor) -> Tensor:
        """The images at ``indices``."""
        return self.array[indices]


class FileImages:
    """Image files, decoded when read: RGB, shorter side scaled to ``size``, centre crop."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.size = size
        self._pool = ThreadPoolExecutor(DECODE_THREADS)  # Pillow decodes outside the GIL

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, decoded now.

        Raises:
            UserError: a file that is not an image.
        """
        arrays = list(self._pool.map(self._decode, [self.paths[i] for i in indices.tolist()]))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, path: Path) -> np.ndarray:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                square = (self.size, self.size)
                return np.asarray(
                    ImageOps.fit(image.convert("RGB"), square, Image.Resampling.BICUBIC)
                )
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"cannot read the image {path}; remove or replace it") from error


@dataclass
class Part:
    """The training or the test part of a data set."""

    images: Images
    labels: np.ndarray | None  # int64 [N]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class ImageData:
    """A data set: name, kind (which preset fits), the two parts, and the shape of an image."""

    name: str
    kind: str
    train: Part
    test: Part
    channels: int
    size: tuple[int, int]  # height, width
    class_names: list[str]

    @property
    def has_labels(self) -> bool:
        """Whether both parts are labelled, so that the probes can run."""
        return self.train.labels is not None and self.test.labels is not None


def locate(spec: str) -> tuple[str, Path | None]:
    """Which kind of source ``spec`` names, and where: ``("digits", None)``, ``("npz", path)``.

    Raises:
        UserError: the path is missing or nothing known is in it.
    """
    if spec == "digits":
        return "digits", None
    prefix, colon, rest = spec.partition(":")
    kind = prefix if colon and prefix in _LOADERS else ""
    path = Path(rest if kind else spec).expanduser()
    if not path.exists():
        raise UserError(
            f"--data {spec}: no such file or folder: {path}; give digits, a path, or KIND:PATH "
            f"with KIND one of {', '.join(_LOADERS)}"
        )
    return kind or _detect(path), path


def load(spec: str, image_size: int = 0) -> ImageData:
    """Load a data set.

    Args:
        spec: ``digits``, a path whose content tells its kind, or ``KIND:PATH``.
        image_size: pixels a side to resize to; 0 keeps the size of the source.

    Raises:
        UserError: a missing, unreadable or inconsistent file, with what was expected.
    """
    kind, path = locate(spec)
    if path is None:
        data = _load_digits()
    elif kind == "folder":
        return _load_folder(path, image_size or FOLDER_IMAGE_SIZE)
    else:
        data = _LOADERS[kind](path)
    if image_size and data.size != (image_size, image_size):
        for part in (data.train, data.test):
            part.images = ArrayImages(_resize(part.images, image_size))
        data.size = (image_size, image_size)
    return data


def _detect(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".npz":
            return "npz"
        raise UserError(f"{path} is not a .npz file; give a .npz file or a folder")
    names = {entry.name for entry in path.iterdir()}
    if any(name.startswith("data_batch_1") for name in names):
        return "cifar10"
    if any(name.startswith("train-images") for name in names):
        return "mnist"
    if any(entry.is_dir() for entry in path.iterdir()):
        return "folder"
    raise UserError(
        f"nothing known in {path}: expected train-images-idx3-ubyte (MNIST format), data_batch_1 "
        "(CIFAR-10), or a folder of images for each class"
    )


def _resize(images: Images, size: int) -> Tensor:
    whole = images.read(torch.arange(len(images))).float()
    resized = torch.nn.functional.interpolate(
        whole, (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _split(count: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a fixed training and test part, stratified where there are labels."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            np.arange(count), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise UserError(f"cannot set a test part aside: {' '.join(str(error).split())}") from error
    return np.sort(train), np.sort(test)


def _assemble(
    name: str,
    kind: str,
    train: tuple[np.ndarray, np.ndarray | None],
    test: tuple[np.ndarray, np.ndarray | None] | None,
    class_names: list[str] | None = None,
) -> ImageData:
    """An ``ImageData`` of arrays uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], and labels."""
    images, labels = _channels_first(train[0], name), _labels(train[1], len(train[0]), name)
    if test is None:
        rows = _split(len(images), labels)
        parts = [(images[r], None if labels is None else labels[r]) for r in rows]
    else:
        test_images = _channels_first(test[0], name)
        parts = [(images, labels), (test_images, _labels(test[1], len(test_images), name))]
    channels, height, width = images.shape[1:]
    if parts[1][0].shape[1:] != images.shape[1:]:
        raise UserError(f"{name}: the test images have another size than the training images")
    if class_names is None:
        classes = 0 if labels is None or not len(labels) else int(labels.max()) + 1
        class_names = [str(label) for label in range(classes)]
    train_part, test_part = (Part(ArrayImages(pixels), labels) for pixels, labels in parts)
    size = (height, width)
    return ImageData(name, kind, train_part, test_part, channels, size, class_names)


def _channels_first(images: np.ndarray, name: str) -> Tensor:
    if images.dtype != np.uint8:
        if images.dtype.kind != "f" or images.size and not 0 <= images.min() <= images.max() <= 1:
            raise UserError(
                f"{name}: images must be uint8 (0 to 255) or floats from 0 to 1, got {images.dtype}"
            )
        images = np.rint(images * 255).astype(np.uint8)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"{name}: images must have the shape [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or "
            f"3 channels, got {list(images.shape)}"
        )
    # np.frombuffer gives read-only arrays, which torch does not take.
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _labels(labels: np.ndarray | None, count: int, name: str) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels).reshape(-1)
    if labels.dtype.kind not in "iu" or len(labels) != count:
        raise UserError(
            f"{name}: labels must be one integer an image, got {len(labels)} of type "
            f"{labels.dtype} for {count} images"
        )
    return labels.astype(np.int64)


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    return _assemble("digits", "digits", (images, digits.target), None)


def _open(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, as MNIST uses them, plain or gzipped.

    Raises:
        UserError: the file is not idx, holds another type, or is cut short.
    """
    raw = _open(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 8:
        raise UserError(f"{path} is not an idx file of unsigned bytes")
    dims = raw[3]
    if len(raw) < 4 + 4 * dims:
        raise UserError(f"{path} is cut short; download it again")
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if body.size != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path} is cut short; download it again")
    return body.reshape(shape)


def _load_idx_folder(folder: Path) -> ImageData:
    def find(part: str, what: str, dims: int) -> np.ndarray:
        names = [f"{part}-{what}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        for name in names:
            if (folder / name).is_file():
                return read_idx(folder / name)
        raise UserError(f"{folder} has no {names[0]} (or .gz)")

    train, test = ((find(part, "images", 3), find(part, "labels", 1)) for part in ("train", "t10k"))
    return _assemble(folder.name, "mnist", train, test)


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


def _load_cifar10(folder: Path) -> ImageData:
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
    train = tuple(np.concatenate(column) for column in zip(*batches, strict=True))
    class_names = None
    if (folder / "batches.meta.txt").is_file():
        class_names = (folder / "batches.meta.txt").read_text().split()
    return _assemble(folder.name, "cifar10", (train[0], train[1]), batch("test_batch"), class_names)


# Names of image and label arrays seen in published .npz files, the usual ones first.
_NPZ_SPLIT = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_NPZ_WHOLE = (("images", "labels"), ("x", "y"), ("X", "y"), ("data", "labels"))


def _load_npz(path: Path) -> ImageData:
    try:
        # Opened here: np.load leaves a file open when what is in it is no zip archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    for x_train, y_train, x_test, y_test in _NPZ_SPLIT:
        if x_train in arrays and x_test in arrays:
            train = arrays[x_train], arrays.get(y_train)
            return _assemble(path.stem, "npz", train, (arrays[x_test], arrays.get(y_test)))
    for x, y in _NPZ_WHOLE:
        if x in arrays:
            return _assemble(path.stem, "npz", (arrays[x], arrays.get(y)), None)
    raise UserError(
        f"{path} has the arrays {', '.join(arrays) or 'none'}; name them images and labels, or "
        "x_train, y_train, x_test and y_test"
    )


def _class_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The image files below ``folder`` in a fixed order, and the class folder of each."""
    paths, classes = [], []
    for directory in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for path in sorted(directory.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                paths.append(path)
                classes.append(directory.name)
    if not paths:
        raise UserError(f"no images in {folder}; expected a folder of images for each class")
    return paths, classes


def _load_folder(folder: Path, size: int) -> ImageData:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    test_folder = next((folder / n for n in ("test", "val") if (folder / n).is_dir()), None)
    whole = not ((folder / "train").is_dir() and test_folder)
    paths, classes = _class_files(folder if whole else folder / "train")
    class_names = sorted(set(classes))
    labels = np.array([class_names.index(name) for name in classes])
    if whole or test_folder is None:
        rows = _split(len(paths), labels)
        parts = [Part(FileImages([paths[i] for i in r], size), labels[r]) for r in rows]
    else:
        test_paths, test_classes = _class_files(test_folder)
        if unknown := set(test_classes) - set(class_names):
            raise UserError(f"{test_folder} has classes that train lacks: {sorted(unknown)[0]}")
        test_labels = np.array([class_names.index(name) for name in test_classes])
        parts = [
            Part(FileImages(paths, size), labels),
            Part(FileImages(test_paths, size), test_labels),
        ]
    return ImageData(folder.name, "folder", parts[0], parts[1], 3, (size, size), class_names)


_LOADERS: dict[str, Callable[[Path], ImageData]] = {
    "mnist": _load_idx_folder,
    "cifar10": _load_cifar10,
    "npz": _load_npz,
    "folder": lambda path: _load_folder(path, FOLDER_IMAGE_SIZE),
}
