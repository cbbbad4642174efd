# SPDX-License-Identifier: Apache-2.0
"""What a data set is known by: the split by name, and the fingerprint in a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssltrain.data.types import UNLABELLED, ImageData, Part
from ssltrain.errors import UserError, note

TEST_SHARE = 0.2  # of the images, where a source has no test part of its own
SPLIT_SEED = 0  # of the stratified split: the same in every run, whatever its seed


def hash_names(names: Iterable[bytes | memoryview]) -> np.ndarray:
    """The first eight bytes of BLAKE2b of each name, int64 [N]."""
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def hash_images(images: Tensor) -> np.ndarray:
    """Images of an array are known by their pixels: int64 [N] from uint8 [N, C, H, W]."""
    flat = images.contiguous().flatten(1).numpy()
    return hash_names(row.data for row in flat)


def hash_captions(part: Part) -> np.ndarray:
    """What the captions of a part are known by, int64 [N]; zeros without captions."""
    if part.captions is None:
        return np.zeros(len(part), np.int64)
    return hash_names(caption.encode("utf-8", "surrogatepass") for caption in part.captions)


def split(names: np.ndarray, labels: np.ndarray | None, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a fixed training and test part of about four to one.

    ``name``: the hash of an image's name decides, so an image stays in its part whatever is added,
    removed or reordered. ``stratified``: four to one in every class, a function of the number and
    order of the images.

    Args:
        names: int64 [N], hashes of names.
        labels: int64 [N] or None.
        how: ``name`` or ``stratified``.

    Raises:
        UserError: there are too few images.
    """
    if len(names) < 2:
        raise UserError(
            f"cannot set a test part aside: there are {len(names)} images; give more, or a test "
            "part of your own"
        )
    if how == "stratified":
        return _stratified(len(names), labels)
    ranks = names.view(np.uint64)
    test = ranks < np.uint64(TEST_SHARE * 2.0**64)
    if not test.any():  # a handful of images: each part needs one
        test[np.argmin(ranks)] = True
    elif test.all():
        test[np.argmax(ranks)] = False
    return np.flatnonzero(~test), np.flatnonzero(test)


def _stratified(count: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            np.arange(count), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise UserError(
            f"cannot set a test part aside: {' '.join(str(error).split())}; --split name can"
        ) from error
    return np.sort(train), np.sort(test)


def fingerprint(data: ImageData) -> dict[str, Any]:
    """Names, sizes and labels of both parts, in types that a checkpoint can hold."""

    def part(part: Part) -> dict[str, Tensor]:
        labels = np.full(len(part), UNLABELLED) if part.labels is None else part.labels
        columns = {"names": part.names, "sizes": part.sizes, "labels": labels}
        if part.captions is not None:
            columns["captions"] = hash_captions(part)
        return {key: torch.from_numpy(np.array(column)) for key, column in columns.items()}

    return {
        "kind": data.kind,
        "channels": data.channels,
        "size": list(data.size),
        "class_names": list(data.class_names),
        "train": part(data.train),
        "test": part(data.test),
    }


def changes(before: dict[str, Any], data: ImageData) -> list[str]:
    """What differs between a fingerprint and a data set, as clauses for a message; none if equal."""
    found: list[str] = []
    shape = [before["channels"], *before["size"]]
    if shape != [data.channels, *data.size]:
        now = [data.channels, *data.size]
        found.append(f"images are {_by(now)}, not {_by(shape)}")
    old_rows, new_rows = _rows(before), _rows(fingerprint(data))
    for name, part in (("training", data.train), ("test", data.test)):
        key = "train" if name == "training" else "test"
        found += _part_changes(name, before[key], part, old_rows, new_rows)
    if not found and before["class_names"] != list(data.class_names):
        found.append("the classes have other names")
    return found


def _rows(state: dict[str, Any]) -> set[int]:
    return {name for key in ("train", "test") for name in state[key]["names"].tolist()}


def _by(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _part_changes(
    name: str, before: dict[str, Tensor], part: Part, old_rows: set[int], new_rows: set[int]
) -> list[str]:
    """The clauses about one part."""
    old = before["names"].numpy()
    found: list[str] = []
    added = np.flatnonzero(~np.isin(part.names, old))
    gone = old[~np.isin(old, part.names)]
    moved = [row for row in added.tolist() if int(part.names[row]) in old_rows]
    new = [row for row in added.tolist() if int(part.names[row]) not in old_rows]
    lost = sum(int(value) not in new_rows for value in gone)
    if new:
        found.append(f"{_count(len(new), name)} new (first {part.title(new[0])})")
    if lost:
        found.append(f"{_count(lost, name)} gone")
    if moved:
        other = "test" if name == "training" else "training"
        found.append(
            f"{_count(len(moved), name)} from the {other} part (first {part.title(moved[0])})"
        )
    if added.size or gone.size:
        return found
    if len(old) != len(part):  # copies of images came or went
        return [f"the {name} part has {len(part)} images, not {len(old)}"]
    if not np.array_equal(old, part.names):
        return [f"the {name} images are in another order"]
    labels = np.full(len(part), UNLABELLED) if part.labels is None else part.labels
    nothing = torch.zeros(len(old), dtype=torch.int64)
    for what, was, now in (
        ("file size", before["sizes"].numpy(), part.sizes),
        ("label", before["labels"].numpy(), labels),
        ("caption", before.get("captions", nothing).numpy(), hash_captions(part)),
    ):
        other_rows = np.flatnonzero(was != now)
        if other_rows.size:
            count, first = len(other_rows), part.title(int(other_rows[0]))
            verb = "has" if count == 1 else "have"
            noun = "image" if count == 1 else "images"
            found.append(f"{count} {name} {noun} {verb} another {what} (first {first})")
    return found


def _count(count: int, name: str) -> str:
    return f"{count} {name} {'image is' if count == 1 else 'images are'}"


def trained_on(before: dict[str, Any], data: ImageData) -> np.ndarray:
    """Row numbers of the test images of ``data`` that the training part of a fingerprint holds."""
    return np.flatnonzero(np.isin(data.test.names, before["train"]["names"].numpy()))


def check_resumed(before: dict[str, Any] | None, data: ImageData, accept: bool) -> None:
    """See that the data of a run that goes on is what its checkpoint was trained on.

    Raises:
        UserError: it has changed and ``accept`` is false; the message says what has changed.
    """
    if before is None:
        note(
            "the checkpoint is of a version that did not keep what the data was: whether it has "
            "changed since cannot be checked"
        )
        return
    if not (found := changes(before, data)):
        return
    what = f"{data.name} is not the data that the run was trained on: {'; '.join(found)}"
    if not accept:
        raise UserError(f"{what}; --accept-changed-data goes on with it all the same")
    note(what)


def check_evaluated(
    before: dict[str, Any] | None, data: ImageData, accept: bool, scores: bool
) -> None:
    """See that no test image was trained on, where a run is evaluated on other data than its own.

    Args:
        before: the fingerprint in the checkpoint, None in old ones.
        data: what the encoder is used on.
        accept: whether training images may be tested on.
        scores: whether accuracies will be computed.

    Raises:
        UserError: ``scores``, and a test image was trained on.
    """
    if before is None or not (found := changes(before, data)):
        return
    leaked = trained_on(before, data)
    if scores and leaked.size and not accept:
        raise UserError(
            f"{len(leaked)} of the {len(data.test)} test images of {data.name} were trained on "
            f"(first {data.test.title(int(leaked[0]))}), so accuracies would mislead; "
            "--accept-changed-data computes them all the same"
        )
    note(f"{data.name} is not the data that the run was trained on: {'; '.join(found)}")
