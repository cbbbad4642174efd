# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: one frozen dataclass, its presets, its checks, its file."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser

from ssltrain.errors import UserError
from ssltrain.presets import preset

TITLES = {
    "simclr": "SimCLR",
    "byol": "BYOL",
    "moco": "MoCo",
    "moco3": "MoCo v3",
    "simsiam": "SimSiam",
    "supcon": "SupCon",
    "clip": "CLIP",
    "autoencoder": "Autoencoder",
    "vae": "VAE",
    "gan": "GAN",
}
METHODS = tuple(TITLES)
Amp = Literal["none", "auto", "bf16", "fp16"]
GENERATIVE = ("autoencoder", "vae", "gan")  # they make images, from one process

# Flags that say how to run, not what to compute: they may differ when a run is resumed.
RUNTIME_FIELDS = frozenset(
    {
        "device",
        "threads",
        "stop_after",
        "evaluate",
        "progress",
        "log_every",
        "save_every",
        "keep_every",
        "knn_every",
        "cache_mb",
        "skip_bad_images",
        "accept_changed_data",
        "dry_run",
    }
)
# What may change too when a run is resumed, and is then kept for the next time.
RESUMABLE_FIELDS = RUNTIME_FIELDS | {"data", "epochs"}


SWITCH: dict[str, Any] = {"nargs": "?", "const": True}  # --flag alone means --flag true


def _option(default: Any, group: str, text: str) -> Any:
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; written to ``config.yaml`` in its folder.

    The defaults below are overlaid by the preset of the method and the data set
    (``ssltrain.presets``), then by ``--config FILE``, then by flags.
    """

    method: Literal[
        "simclr", "byol", "moco", "moco3", "simsiam", "supcon", "clip", "autoencoder", "vae", "gan"
    ] = _option("simclr", "run", "training method")
    data: str = _option(
        "digits", "data", "digits, or a path, or mnist:DIR, cifar10:DIR, npz:FILE, folder:DIR"
    )
    image_size: int = _option(
        0, "data", "pixels a side after resizing; 0 keeps the size (image folders: 64)"
    )
    layout: Literal["auto", "classes", "parts", "flat"] = _option(
        "auto",
        "data",
        "what the folders in an image folder are: classes; parts (train, test) with classes in "
        "them; or flat: nothing, the images are unlabelled",
    )
    split: Literal["name", "stratified"] = _option(
        "name",
        "data",
        "test part of data that has none: by a hash of each image's name, or so many of each class",
    )
    skip_bad_images: bool = _option(False, "data", "leave out image files that cannot be read")
    pixel_range: str = _option(
        "auto",
        "data",
        "values of black and white in pixels of more than 8 bits: LOW:HIGH, image (the range of "
        "each), type (the range of the number type) or auto",
    )
    background: str = _option("white", "data", "colour behind transparent pixels")
    accept_changed_data: bool = _option(
        False, "data", "go on with a run though its data has changed since the last checkpoint"
    )
    cache_mb: int = _option(
        2048, "data", "an image folder up to this size, decoded, is held in memory (MB)"
    )

    recipe: str = _option(
        "", "run", "settings of a paper, which replace the presets: 'ssltrain recipes' lists them"
    )

    backbone: str = _option("resnet", "model", "resnet, timm:NAME or module:factory")
    width: int = _option(32, "model", "channels of the first stage of resnet")
    stages: int = _option(4, "model", "stages of resnet; each after the first halves the image")
    blocks: int = _option(2, "model", "residual blocks a stage of resnet")
    stem_stride: int = _option(
        1, "model", "stride of the first convolution of resnet; 2 costs a quarter"
    )
    pool: int = _option(
        1, "model", "features of resnet are means over so many parts a side of its last map"
    )
    batch_norm: Literal["auto", "sync", "shuffle", "local"] = _option(
        "auto",
        "model",
        "of several processes: sync (over all of them), shuffle (moco: keys are encoded in a random "
        "mix of all), local (over each one's share); auto is shuffle for moco and sync elsewhere",
    )
    projector_hidden: int = _option(512, "model", "hidden width of the projector")
    projector_dim: int = _option(128, "model", "output width of projector and predictor")
    projector_layers: int = _option(
        0, "model", "layers of the projector; 0 is as in the paper of the method, 1 is linear"
    )
    predictor_hidden: int = _option(
        0,
        "model",
        "hidden width of the predictor; 0 is that of the projector (byol, moco3) or a quarter of "
        "the output (simsiam)",
    )

    temperature: float = _option(
        0.1, "loss", "softmax temperature (not byol, simsiam); clip learns it from there on"
    )
    queue_size: int = _option(4096, "loss", "negatives kept in the queue (moco)")
    queue_dtype: Literal["float32", "bf16"] = _option(
        "float32", "loss", "precision of the queue (moco)"
    )
    ema_decay: float = _option(
        0.99, "loss", "decay of the target network; byol and moco3 raise it to 1 along a cosine"
    )
    symmetric: bool = _option(
        False, "loss", "moco: also use view 2 as query and view 1 as key (the others always do)"
    )
    mask: float = _option(0.0, "loss", "share of patches that are hidden from it (autoencoder)")
    patch: int = _option(2, "loss", "pixels a side of a hidden patch (autoencoder)")
    beta: float = _option(1.0, "loss", "weight of the KL term, after a linear warm-up (vae)")
    free_bits: float = _option(0.0, "loss", "nats a code that cost nothing (vae)")
    gan_form: Literal["non_saturating", "hinge", "least_squares", "wasserstein"] = _option(
        "non_saturating", "loss", "adversarial loss (gan)"
    )
    r1: float = _option(
        0.0,
        "loss",
        "weight of the R1 penalty of the discriminator, taken at every fourth step four times as large "
        "(gan); no batch norm with it",
    )
    loss_backend: Literal["fused", "eager"] = _option(
        "fused", "loss", "losses, queue and average of sslkernels, or plain PyTorch to compare with"
    )

    crop_min: float = _option(0.2, "augmentation", "least area of a random crop; 1 turns it off")
    flip: float = _option(0.5, "augmentation", "probability of a horizontal flip")
    jitter: float = _option(0.5, "augmentation", "strength of colour jitter; 0 turns it off")
    gray: float = _option(0.2, "augmentation", "probability of dropping the colour")
    blur: float = _option(0.0, "augmentation", "probability of a Gaussian blur")
    rotate: float = _option(0.0, "augmentation", "largest rotation in degrees")
    translate: float = _option(0.0, "augmentation", "largest shift as a share of the side")
    zoom: float = _option(0.0, "augmentation", "largest relative change of scale")
    shear: float = _option(0.0, "augmentation", "largest shear in degrees")
    elastic: float = _option(0.0, "augmentation", "strength of elastic deformation")
    erase: float = _option(0.0, "augmentation", "probability of erasing a rectangle")
    noise: float = _option(0.0, "augmentation", "standard deviation of Gaussian noise")
    crops: int = _option(
        0,
        "augmentation",
        "small views of each image beside the two (multi-crop: simclr, byol, supcon)",
    )
    crop_size: int = _option(0, "augmentation", "pixels a side of small views; 0 is half the image")
    crop_max: float = _option(0.4, "augmentation", "largest area of small views")

    sampler: Literal["shuffle", "stratified"] = _option(
        "shuffle",
        "optimisation",
        "shuffle: every image once an epoch; stratified: drawn with replacement, each class alike",
    )
    epochs: int = _option(100, "optimisation", "passes over the training images")
    batch_size: int = _option(256, "optimisation", "images a step, over all processes")
    micro_batch: int = _option(
        0, "optimisation", "images a forward pass and process; 0 is the whole batch"
    )
    optimizer: Literal["sgd", "adamw", "lars"] = _option("sgd", "optimisation", "optimiser")
    base_lr: float = _option(0.06, "optimisation", "learning rate for 256 images a step")
    momentum: float = _option(0.9, "optimisation", "momentum (sgd, lars)")
    weight_decay: float = _option(5e-4, "optimisation", "weight decay, not on biases and norms")
    warmup: float = _option(0.1, "optimisation", "share of the steps for linear warm-up")
    schedule: Literal["cosine", "steps", "constant"] = _option(
        "cosine",
        "optimisation",
        "of the learning rate; steps divides by 10 after 60 and 80 percent",
    )
    clip_grad: float = _option(
        0.0, "optimisation", "largest norm of the gradient of a step; 0 does not clip"
    )
    amp: Amp = _option(
        "none",
        "optimisation",
        "autocast of the networks; fp16 scales the loss; auto is bf16 where the processor computes it",
    )

    seed: int = _option(0, "run", "seed of weights, order and augmentation")
    init_from: str = _option("", "run", "run folder whose weights the run starts from")
    run: str = _option("", "run", "run folder; the default is runs/METHOD-DATA-seedN")
    device: str = _option("auto", "run", "auto, cpu, cuda or any torch device")
    threads: int = _option(0, "run", "CPU threads; 0 leaves it to torch")
    log_every: int = _option(10, "run", "steps between updates of the bar and TensorBoard")
    save_every: int = _option(
        10, "run", "epochs between checkpoints, each in the place of the last"
    )
    keep_every: int = _option(0, "run", "epochs between checkpoints that are kept; 0 keeps none")
    knn_every: int = _option(
        5, "run", "epochs between k-NN on training images; the best network is kept; 0 is never"
    )
    stop_after: int = _option(0, "run", "stop, with a checkpoint, after this many steps; 0 never")
    dry_run: bool = _option(
        False,
        "run",
        "check settings and data, take one step, say what a run would be; write nothing",
    )
    evaluate: bool = _option(True, "run", "evaluate and draw the plots at the end")
    progress: bool = _option(True, "run", "show a progress bar")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: ``base_lr`` scaled linearly with the batch."""
        return self.base_lr * self.batch_size / 256

    @property
    def norms(self) -> str:
        """What ``batch_norm`` stands for: sync, shuffle or local."""
        if self.batch_norm != "auto":
            return self.batch_norm
        return "shuffle" if self.method == "moco" else "sync"

    def validate(self) -> TrainConfig:
        """Return self, or raise a ``UserError`` that names the flag and what must hold."""
        positive = (
            "width",
            "stages",
            "blocks",
            "stem_stride",
            "pool",
            "projector_hidden",
            "projector_dim",
            "queue_size",
            "epochs",
            "batch_size",
            "log_every",
            "save_every",
            "patch",
        )
        not_negative = (
            "image_size", "micro_batch", "weight_decay", "cache_mb", "clip_grad",
            "projector_layers", "predictor_hidden", "crops", "crop_size", "keep_every", "knn_every",
            "stop_after", "threads", "beta", "free_bits", "r1",
            "jitter", "rotate", "translate", "zoom", "shear", "elastic", "noise", "base_lr", "seed",
        )  # fmt: skip
        for name in positive:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in not_negative:
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("flip", "gray", "blur", "erase", "ema_decay", "momentum", "warmup"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._check("temperature", self.temperature > 0, "greater than 0")
        self._check("mask", 0 <= self.mask < 1, "at least 0 and less than 1")
        for name in ("crop_min", "crop_max"):
            self._check(name, 0 < getattr(self, name) <= 1, "greater than 0 and at most 1")
        several = self.method in ("simclr", "byol", "supcon")
        self._check("crops", several or not self.crops, f"0, as {self.method} has two views")
        moco = self.method == "moco"
        self._check("batch_norm", moco or self.batch_norm != "shuffle", "auto, sync or local")
        self._check("zoom", self.zoom < 1, "less than 1")
        self._check("batch_size", self.batch_size >= 2, "at least 2 (a loss needs negatives)")
        parse_range(self.pixel_range)
        self._check("background", _is_colour(self.background), "a colour name or #rrggbb")
        return self

    def _check(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{flag(name)} must be {what}, got {getattr(self, name)}")

    def save(self, path: Path) -> None:
        """Write the configuration as YAML, in a form that ``--config`` and ``load`` read."""
        partial = path.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a configuration that ``save`` wrote.

        Raises:
            UserError: the file is missing, is not YAML, or has a wrong key or value.
        """
        values = config_parser(cls(), "ssltrain").parse_args(["--config", str(path)]).as_dict()
        values.pop("config", None)
        if "split" not in yaml.safe_load(path.read_text()):  # written before there was a choice
            values["split"] = "stratified"
        return cls(**values).validate()

    @classmethod
    def from_presets(cls, method: str, data: str, kind: str) -> TrainConfig:
        """The defaults of ``method`` on a data set of ``kind`` (see ``ssltrain.presets``)."""
        return cls(**{"method": method, "data": data, **preset(method, kind)})


def flag(name: str) -> str:
    """The command-line spelling of a field: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def parse_range(text: str) -> tuple[float, float] | None:
    """``LOW:HIGH`` as two numbers, or None for one of the words ``auto``, ``type``, ``image``.

    Raises:
        UserError: it is neither.
    """
    if text in ("auto", "type", "image"):
        return None
    low, colon, high = text.partition(":")
    try:
        values = float(low), float(high)
    except ValueError:
        values = (math.nan, math.nan)
    if not colon or not all(map(math.isfinite, values)) or values[0] >= values[1]:
        raise UserError(
            f"--pixel-range must be auto, type, image, or LOW:HIGH with LOW less than HIGH, "
            f"got {text}"
        )
    return values


def _is_colour(text: str) -> bool:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True


class OneLineParser(ArgumentParser):
    """A parser whose errors are a ``UserError`` of one line in the user's own terms."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what argparse would print after a page of usage."""
        message = re.sub(r'Parser key "(\w+)":', lambda found: flag(found[1]) + ":", message)
        message = re.sub(r"Expected a <class '(\w+)'>", r"expected a value of type \1", message)
        message = re.sub(r"Expected a typing.Literal\[(.*?)\]", r"expected one of \1", message)
        message = " ".join(message.split()).rstrip(".")
        raise UserError(f"{message}; '{self.prog} --help' lists the flags")


def config_parser(defaults: TrainConfig, prog: str) -> OneLineParser:
    """A parser with one flag a field of ``TrainConfig`` and ``--config FILE``."""
    parser = OneLineParser(prog=prog, allow_abbrev=False, default_env=False)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; flags after it win"
    )
    types = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(TrainConfig):
        title = item.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            flag(item.name),
            type=types[item.name],
            default=getattr(defaults, item.name),
            **SWITCH if types[item.name] is bool else {},
            # Commands name the method; the key is there for configuration files alone.
            help=argparse.SUPPRESS if item.name == "method" else item.metadata["help"],
        )
    return parser
