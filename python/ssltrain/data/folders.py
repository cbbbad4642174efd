# SPDX-License-Identifier: Apache-2.0
"""Image folders: which files are images, and whether a subfolder is a class or a part."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ssltrain.data.captions import CAPTIONS, read_captions
from ssltrain.data.files import check_files
from ssltrain.data.fingerprint import hash_names, split
from ssltrain.data.types import UNLABELLED, DataOptions, ImageData, Part, Subset
from ssltrain.errors import UserError

IMAGE_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pfm .pgm .png .pnm .ppm "
    ".qoi .tga .tif .tiff .webp".split()
)
FOLDER_IMAGE_SIZE = 64  # pixels a side when an image folder gets no --image-size
# Folders that programs leave behind, beside all whose names start with a dot.
LITTER = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})
LITTER |= frozenset({"lost+found", "__pycache__"})

TRAIN, TEST, VALIDATION = "train", "test", "validation"
_PART_NAMES = {
    TRAIN: ("train", "training", "trainset"),
    TEST: ("test", "testing", "testset", "eval", "evaluation"),
    VALIDATION: ("val", "valid", "validate", "validation", "dev"),
}
_PART_OF = {name: part for part, names in _PART_NAMES.items() for name in names}


def part_of(name: str) -> str | None:
    """Which part a folder is named after, in any case: ``Train``, ``val2017``, ``test_set``."""
    word = re.sub(r"[-_ .]*(set|images?|imgs?|data|split|folder|\d+)$", "", name.casefold())
    return _PART_OF.get(word) or _PART_OF.get(name.casefold())


@dataclass
class Found:
    """Image files of one part: paths, and the class folder of each, None where there is none."""

    paths: list[Path] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)

    def add(self, paths: list[Path], name: str | None) -> None:
        """Add the files of a class."""
        self.paths += paths
        self.classes += [name] * len(paths)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is never data."""
    return name.startswith(".") or name.casefold() in LITTER


class Tree:
    """The folders and image files below a folder, in a fixed order, litter left out."""

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()  # suffixes of files that are no images by their names
        self._listed: dict[Path, tuple[list[Path], list[Path]]] = {}

    def folders(self, folder: Path) -> list[Path]:
        """The folders directly in ``folder``."""
        return self._list(folder)[0]

    def files(self, folder: Path) -> list[Path]:
        """The image files directly in ``folder``."""
        return self._list(folder)[1]

    def below(self, folder: Path) -> list[Path]:
        """All image files in ``folder`` and the folders in it."""
        return list(self._below(folder, frozenset()))

    def has_images(self, folder: Path) -> bool:
        """Whether any image file is in ``folder`` or the folders in it."""
        return next(self._below(folder, frozenset()), None) is not None

    def _below(self, folder: Path, above: frozenset[Path]) -> Iterator[Path]:
        real = folder.resolve()
        if real in above:  # a link to a folder that holds it
            return
        yield from self.files(folder)
        for inner in self.folders(folder):
            yield from self._below(inner, above | {real})

    def _list(self, folder: Path) -> tuple[list[Path], list[Path]]:
        if folder not in self._listed:
            folders, images = [], []
            try:
                with os.scandir(folder) as entries:
                    found = sorted((entry for entry in entries), key=lambda entry: entry.name)
            except OSError as error:
                raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
            for entry in found:
                path = folder / entry.name
                if is_litter(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(path)
                elif path.suffix.lower() in IMAGE_SUFFIXES:
                    images.append(path)
                elif entry.name != CAPTIONS:
                    self.others[path.suffix.lower() or "without a suffix"] += 1
            self._listed[folder] = folders, images
        return self._listed[folder]


class Layout:
    """How the folders of a data set were read: the files of its parts, and notes about it."""

    def __init__(self, root: Path, asked: str) -> None:
        """Read the folders.

        Args:
            root: the folder of the data set.
            asked: ``auto``, ``classes``, ``parts`` or ``flat``.

        Raises:
            UserError: there are no images, or the folders could be classes or parts.
        """
        self.root = root
        self.tree = Tree()
        self.notes: list[str] = []
        self.train = Found()
        self.test: Found | None = None
        if asked == "flat":
            self.train.add(self.tree.below(root), None)
        elif asked == "classes":
            self.train = self._classes(root)
        else:
            self._read(root, asked)
        if not self.train.paths:
            raise UserError(
                f"no images in {root}; expected a folder of images for each class, or images"
                + self._others()
            )
        if others := self._others():
            self.notes.append(f"not all files are taken for images{others}")

    def _others(self) -> str:
        counts = self.tree.others.most_common(5)
        listed = ", ".join(f"{count} {suffix}" for suffix, count in counts)
        return f"; left out by their names: {listed}" if listed else ""

    def _read(self, root: Path, asked: str) -> None:
        folders = [folder for folder in self.tree.folders(root) if self.tree.has_images(folder)]
        if asked == "parts" or any(part_of(folder.name) for folder in folders):
            self._parts(root, folders, asked)
            return
        only = folders[0] if len(folders) == 1 else root
        inner = [folder for folder in self.tree.folders(only) if self.tree.has_images(folder)]
        if len(folders) == 1 and any(part_of(folder.name) for folder in inner):
            self.notes.append(f"{only} is read: it is all that {root} holds")
            self._read(only, asked)
            return
        if len(folders) == 1 and len(inner) > 1:
            raise UserError(
                f"{root} holds one folder, {only.name}, with {len(inner)} folders in it: say "
                f"--data {only} if these are the classes, or --layout classes if {only.name} is "
                "one class"
            )
        for folder in folders:
            parts = {part_of(f.name) for f in self.tree.folders(folder)} - {None}
            if TRAIN in parts and len(parts) > 1:
                raise UserError(
                    f"{folder} holds a training and a test part of one class; make train/CLASS and "
                    "test/CLASS of them, or say --layout classes to put the parts together"
                )
        self.train = self._classes(root)

    def _classes(self, folder: Path) -> Found:
        """A folder of images for each class, or images without classes."""
        found = Found()
        for inner in self.tree.folders(folder):
            found.add(self.tree.below(inner), inner.name)
        own = self.tree.files(folder)
        if not found.paths:
            found.add(own, None)
        elif own:
            self.notes.append(
                f"{len(own)} images directly in {folder} are left out: they are in no class"
            )
        return found

    def _parts(self, root: Path, folders: list[Path], asked: str) -> None:
        """Folders named after parts, with nothing beside them."""
        parts: dict[str | None, list[Path]] = {}
        for folder in folders:
            parts.setdefault(part_of(folder.name), []).append(folder)
        strangers = parts.pop(None, [])
        listed = ", ".join(folder.name for folder in folders) or "no folders of images"
        twice = [members for members in parts.values() if len(members) > 1]
        if twice:
            raise UserError(
                f"{root} holds {listed}: {' and '.join(f.name for f in twice[0])} are one part "
                "twice; move one away, or say --layout classes if the folders are classes"
            )
        if TRAIN not in parts:
            raise UserError(
                f"{root} holds {listed}, but no training part (train); say --layout classes if the "
                "folders are classes"
            )
        if strangers and asked != "parts":
            raise UserError(
                f"{root} holds {listed}: classes, or parts of the data? say --layout classes, or "
                f"--layout parts (which leaves out {strangers[0].name})"
            )
        if strangers:
            names = ", ".join(folder.name for folder in strangers)
            self.notes.append(f"left out beside the parts: {names}")
        self.train = self._classes(parts[TRAIN][0])
        tests = [parts[name][0] for name in (TEST, VALIDATION) if name in parts]
        if not tests:
            self.notes.append(f"{root} has no test part: a fifth of {parts[TRAIN][0].name} is one")
            return
        found = {folder: self._classes(folder) for folder in tests}
        # A test part without classes, as competitions have them, serves less than one with them.
        chosen = next((f for f in tests if None not in found[f].classes), tests[0])
        self.test = found[chosen]
        for other in tests:
            if other != chosen:
                self.notes.append(f"{other.name} is left out; the test part is {chosen.name}")


def load_folder(folder: Path, options: DataOptions) -> ImageData:
    """Load a folder of images.

    Raises:
        UserError: no images, broken images, or folders whose meaning is not clear.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images")
    size = options.image_size or FOLDER_IMAGE_SIZE
    layout = Layout(folder, options.layout)
    test = layout.test or Found()
    paths = layout.train.paths + test.paths
    class_names, labels = _labels(folder, layout.train, test)
    checked = check_files(paths, size, options)
    kept = checked.kept
    paths, labels = [paths[i] for i in kept], labels[kept]
    titles = [path.relative_to(folder).as_posix() for path in paths]
    names = hash_names(map(os.fsencode, titles))
    if layout.test is None:
        rows = split(names, labels, options.split)
    else:
        is_test = kept >= len(layout.train.paths)
        rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    sizes = np.array([path.stat().st_size for path in paths], np.int64)
    parts = []
    for what, chosen in zip(("training", "test"), rows, strict=True):
        if not len(chosen):
            raise UserError(f"the {what} part of {folder} has no image that can be read")
        own = [titles[i] for i in chosen]
        images = Subset(checked.images, torch.from_numpy(chosen))
        captions = read_captions(folder, own)
        parts.append(
            Part(images, labels[chosen], names[chosen], sizes[chosen], own.__getitem__, captions)
        )
    return ImageData(
        folder.name,
        "folder",
        parts[0],
        parts[1],
        3,
        (size, size),
        class_names,
        layout.notes + checked.notes,
        checked.pixel_range,
    )


def _labels(folder: Path, train: Found, test: Found) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the class of each file of both parts, -1 without one."""
    known, tested = ({name for name in part.classes if name} for part in (train, test))
    if known and (unknown := tested - known):
        raise UserError(
            f"the test part of {folder} has classes that its training part lacks: "
            f"{sorted(unknown)[0]}"
        )
    class_names = sorted(known or tested)
    index = {name: i for i, name in enumerate(class_names)}
    rows = [UNLABELLED if name is None else index[name] for name in train.classes + test.classes]
    return class_names, np.array(rows, np.int64)
