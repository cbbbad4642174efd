# SPDX-License-Identifier: Apache-2.0
"""Data sources: digits, idx folders (MNIST), CIFAR-10 folders, ``.npz`` files, image folders.

Every source becomes an ``ImageData``: uint8 images of one size, a training and a test part, and
labels where there are any. Labels are used by the evaluation only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ssltrain.data.arrays import load_cifar10, load_digits, load_idx_folder, load_npz, read_idx
from ssltrain.data.captions import check_captions
from ssltrain.data.fingerprint import check_evaluated, check_resumed, fingerprint
from ssltrain.data.folders import Tree, load_folder
from ssltrain.data.types import (
    UNLABELLED,
    ArrayImages,
    DataOptions,
    ImageData,
    Images,
    Part,
    Subset,
)
from ssltrain.errors import UserError

__all__ = [
    "UNLABELLED",
    "ArrayImages",
    "DataOptions",
    "ImageData",
    "Images",
    "Part",
    "Subset",
    "absolute",
    "check_captions",
    "check_evaluated",
    "check_resumed",
    "fingerprint",
    "load",
    "locate",
    "read_idx",
]

_LOADERS: dict[str, Callable[[Path, DataOptions], ImageData]] = {
    "mnist": load_idx_folder,
    "cifar10": load_cifar10,
    "npz": load_npz,
    "folder": load_folder,
}


def _parse(spec: str) -> tuple[str, Path]:
    """The kind that ``spec`` begins with, if any, and the absolute path."""
    prefix, colon, rest = spec.partition(":")
    kind = prefix if colon and prefix in _LOADERS else ""
    return kind, Path(os.path.abspath(Path(rest if kind else spec).expanduser()))


def absolute(spec: str) -> str:
    """The same source, whatever the working directory is."""
    if spec == "digits":
        return spec
    kind, path = _parse(spec)
    return f"{kind}:{path}" if kind else str(path)


def locate(spec: str) -> tuple[str, Path | None]:
    """Which kind of source ``spec`` names, and where: ``("digits", None)``, ``("npz", path)``.

    Raises:
        UserError: the path is missing or nothing known is in it.
    """
    if spec == "digits":
        return "digits", None
    kind, path = _parse(spec)
    if not path.exists():
        raise UserError(
            f"--data {spec}: no such file or folder: {path}; give digits, a path, or KIND:PATH "
            f"with KIND one of {', '.join(_LOADERS)}"
        )
    return kind or _detect(path), path


def load(spec: str, options: DataOptions | None = None) -> ImageData:
    """Load a data set.

    Args:
        spec: ``digits``, a path whose content tells its kind, or ``KIND:PATH``.
        options: how it is read; None for the defaults.

    Raises:
        UserError: a missing, unreadable or inconsistent file, with what was expected.
    """
    kind, path = locate(spec)
    options = options or DataOptions()
    data = load_digits(options) if path is None else _LOADERS[kind](path, options)
    for name, part in (("training", data.train), ("test", data.test)):
        if not len(part):
            raise UserError(f"the {name} part of {data.name} has no images")
    return data


def _detect(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".npz":
            return "npz"
        raise UserError(f"{path} is not a .npz file; give a .npz file or a folder")
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from error
    if names & {"data_batch_1", "data_batch_1.bin"}:
        return "cifar10"
    if any(re.match(r"train-images[-.]idx3-ubyte", name) for name in names):
        return "mnist"
    if Tree().has_images(path):
        return "folder"
    raise UserError(
        f"nothing known in {path}: expected train-images-idx3-ubyte (MNIST format), data_batch_1 "
        "(CIFAR-10), a folder of images for each class, or images"
    )
