# SPDX-License-Identifier: Apache-2.0
"""Captions of an image folder: ``metadata.csv`` with a line for each image."""

from __future__ import annotations

import csv
from pathlib import Path

from ssltrain.data.types import Part
from ssltrain.errors import UserError

CAPTIONS = "metadata.csv"
COLUMNS = ("file_name", "text")  # as the image folders of Hugging Face's datasets have them


def read_captions(folder: Path, images: list[str]) -> list[str] | None:
    """The caption of each of ``images``, empty for one that has none; None without captions.

    Args:
        folder: the folder of the data set.
        images: paths of its images, relative to it, with forward slashes.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / CAPTIONS
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                return None  # a table of something else
            texts = {line["file_name"]: line["text"] or "" for line in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return [texts.get(image, "").strip() for image in images]


def check_captions(part: Part, name: str) -> list[str]:
    """The captions of a part, of which each image has one.

    Raises:
        UserError: they are missing.
    """
    if part.captions is None:
        raise UserError(
            f"{name} has no captions; clip trains on pairs: an image folder with {CAPTIONS} "
            "(columns file_name and text), or an .npz file with captions beside the images"
        )
    without = [row for row, caption in enumerate(part.captions) if not caption]
    if without:
        raise UserError(
            f"{len(without)} of the {len(part)} images of {name} have no caption (first "
            f"{part.title(without[0])})"
        )
    return part.captions
