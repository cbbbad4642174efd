# SPDX-License-Identifier: Apache-2.0
"""Image files: found broken before training, decoded into memory where they fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssltrain.data.decode import Decoder, Inspection
from ssltrain.data.pixels import Extent, choose_range
from ssltrain.data.types import ArrayImages, DataOptions, Images
from ssltrain.errors import UserError

DECODE_THREADS = 4  # Pillow decodes outside the GIL
SLOW_SCAN_S = 2.0  # a scan that takes longer gets a bar


class FileImages:
    """Image files that are decoded whenever they are read."""

    def __init__(self, paths: list[Path], decoder: Decoder) -> None:
        self.paths = paths
        self.decoder = decoder
        self._pool = ThreadPoolExecutor(DECODE_THREADS)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, decoded now.

        Raises:
            UserError: a file can no longer be read.
        """
        chosen = [self.paths[i] for i in indices.tolist()]
        with _quiet():
            arrays = list(self._pool.map(self._decode, chosen))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, path: Path) -> np.ndarray:
        try:
            return self.decoder.decode(path)
        except UserError as error:
            raise UserError(f"cannot read the image {path}: it {error}") from error


class Checked(NamedTuple):
    """Image files after the look at each of them.

    Attributes:
        images: those that can be read.
        kept: row numbers of these among the files that were given, int64.
        pixel_range: the range that deep images are scaled from; ``auto`` if there are none.
        notes: what a user should know.
    """

    images: Images
    kept: np.ndarray
    pixel_range: str
    notes: list[str]


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings about odd files; entered by one thread, around those of the pool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_files(paths: list[Path], size: int, options: DataOptions) -> Checked:
    """Decode every file once, so that a broken one is found before training.

    Raises:
        UserError: a file that cannot be read, without ``--skip-bad-images``; none that can; or
            pixels of unknown range.
    """
    decoder = Decoder(size, options.background, options.pixel_range)
    fits = len(paths) * 3 * size * size <= options.cache_mb * 2**20
    cache = np.zeros((len(paths), 3, size, size) if fits else (0, 3, size, size), np.uint8)
    extents: dict[int, Extent] = {}
    bad: dict[int, str] = {}

    def look(row: int) -> Inspection | UserError:
        try:
            return decoder.inspect(paths[row])
        except UserError as error:
            return error

    with _quiet(), ThreadPoolExecutor(DECODE_THREADS) as pool:
        bar = tqdm(
            pool.map(look, range(len(paths))),
            "checking images",
            len(paths),
            unit="image",
            delay=SLOW_SCAN_S,
            disable=not options.progress,
            leave=False,
        )
        for row, found in enumerate(bar):
            if isinstance(found, UserError):
                bad[row] = str(found)
            elif found.extent is not None:
                extents[row] = found.extent
            elif fits and found.pixels is not None:
                cache[row] = found.pixels.transpose(2, 0, 1)
    notes = _report_bad(paths, bad, options)
    chosen, note = _range_of_all(paths, extents, options)
    notes += note
    decoder = Decoder(size, options.background, chosen)
    kept = np.array([row for row in range(len(paths)) if row not in bad], np.int64)
    if not fits:
        return Checked(FileImages([paths[i] for i in kept], decoder), kept, chosen, notes)
    if extents:
        rows = sorted(extents)
        deep = FileImages([paths[i] for i in rows], decoder)
        for begin in range(0, len(rows), 256):
            block = torch.arange(begin, min(begin + 256, len(rows)))
            cache[rows[begin : begin + 256]] = deep.read(block).numpy()
    images = cache if not bad else cache[kept]
    return Checked(ArrayImages(torch.from_numpy(images)), kept, chosen, notes)


def _report_bad(paths: list[Path], bad: dict[int, str], options: DataOptions) -> list[str]:
    if not bad:
        return []
    row, reason = next(iter(bad.items()))
    first = f"{paths[row]} {reason}"
    if not options.skip_bad_images:
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(
            f"the image {first}{others}; replace or remove it, or leave out what cannot be read "
            "with --skip-bad-images"
        )
    if len(bad) == len(paths):
        raise UserError(f"none of the {len(paths)} images can be read; the first: {first}")
    plural = "image that cannot be read is" if len(bad) == 1 else "images that cannot be read are"
    return [f"{len(bad)} {plural} left out; the first: {first}"]


def _range_of_all(
    paths: list[Path], extents: dict[int, Extent], options: DataOptions
) -> tuple[str, list[str]]:
    """One range for all deep images, found from all of them, and a note that says so."""
    if not extents:
        return options.pixel_range, []
    whole: Extent | None = None
    for found in extents.values():
        whole = found.join(whole)
    if whole is None:
        return options.pixel_range, []
    try:
        chosen = choose_range(whole, options.pixel_range)
    except UserError as error:
        worst = max(extents, key=lambda row: max(extents[row].high, -extents[row].low))
        raise UserError(f"the image {paths[worst]} {error}") from error
    return chosen, range_note(len(extents), whole, chosen)


def range_note(count: int, found: Extent, chosen: str) -> list[str]:
    """A sentence that says which range was guessed; none where it is the whole range of a type."""
    if chosen in ("0:1", "0:65535"):
        return []
    black, _, white = chosen.partition(":")
    return [
        f"{count} images with pixels of more than 8 bits hold values from {found.low:g} to "
        f"{found.high:g}: {black} was taken for black and {white} for white; --pixel-range changes it"
    ]
