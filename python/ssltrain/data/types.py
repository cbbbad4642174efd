# SPDX-License-Identifier: Apache-2.0
"""What every data source becomes, and the settings that say how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from ssltrain.config import TrainConfig

UNLABELLED = -1  # the label of an image that has none


@dataclass(frozen=True)
class DataOptions:
    """How a source is read; the fields are settings of the same names in ``TrainConfig``."""

    image_size: int = 0
    layout: str = "auto"
    split: str = "name"
    pixel_range: str = "auto"
    background: str = "white"
    skip_bad_images: bool = False
    cache_mb: int = 2048
    progress: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> DataOptions:
        """The settings of a run that concern its data."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})


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


@dataclass
class Subset:
    """Some of the images of another: those at ``rows``, int64 [N]."""

    images: Images
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` of the subset."""
        return self.images.read(self.rows[indices])


@dataclass
class Part:
    """The training or the test part of a data set.

    Attributes:
        images: the images.
        labels: int64 [N], the class of each image, -1 where it has none; None if none has one.
        names: int64 [N], a hash of what an image is known by (``ssltrain.data.fingerprint``).
        sizes: int64 [N], bytes of its file; zeros for images of an array.
        title: the words that name an image in a message, by its row.
        captions: a text for each image, where the data set has them (``ssltrain clip``).
    """

    images: Images
    labels: np.ndarray | None
    names: np.ndarray
    sizes: np.ndarray
    title: Callable[[int], str]
    captions: list[str] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and not np.any(self.labels != UNLABELLED):
            self.labels = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled(self) -> np.ndarray:
        """Row numbers of the images that have a label, int64."""
        if self.labels is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.labels != UNLABELLED)


@dataclass
class ImageData:
    """A data set: name, kind (which preset fits), the two parts, and the shape of an image.

    ``notes`` are sentences about what was done to the data that a user should read, and
    ``pixel_range`` is the range that images of more than 8 bits were scaled from.
    """

    name: str
    kind: str
    train: Part
    test: Part
    channels: int
    size: tuple[int, int]  # height, width
    class_names: list[str]
    notes: list[str] = field(default_factory=list)
    pixel_range: str = "auto"

    @property
    def unlabelled(self) -> str:
        """Why the probes cannot run on this data set; empty where they can."""
        train, test = self.train, self.test
        if train.labels is None and test.labels is None:
            return "has no labels"
        if train.labels is None or test.labels is None:
            return f"has no labels in its {'training' if train.labels is None else 'test'} part"
        classes = np.unique(train.labels[train.labelled])
        if len(classes) < 2:
            return "has one class only"
        return ""

    @property
    def has_labels(self) -> bool:
        """Whether both parts have labels of two classes or more, so that the probes can run."""
        return not self.unlabelled
