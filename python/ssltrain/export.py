# SPDX-License-Identifier: Apache-2.0
"""The encoder of a run as a file of its own, with lines that show how to use it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssltrain.config import TrainConfig
from ssltrain.errors import UserError
from ssltrain.methods import load_encoder, online_weights, part_of
from ssltrain.models import build_encoder
from ssltrain.runs import replaced

FORMATS = {"torch": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


def write_encoder(out: Path, form: str, config: TrainConfig, state: dict[str, Any]) -> str:
    """Write the encoder of a checkpoint.

    Args:
        out: the file.
        form: a key of FORMATS.
        config: the run.
        state: its checkpoint.

    Returns:
        Lines of Python that load the file and compute features.

    Raises:
        UserError: the package that a format needs is missing, or the image size is unknown.
    """
    weights = part_of(online_weights(state["method"]), "encoder")
    # Copies: some of these may share memory, which safetensors refuses.
    weights = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    channels = weights["mean"].numel()
    try:
        if form == "torch":
            with replaced(out) as file:
                torch.save(weights, file)
            return _torch_example(f'torch.load("{out}")', config, channels)
        if form == "safetensors":
            _write_safetensors(out, weights, config)
            return _torch_example(f'load_file("{out}")', config, channels)
        _write_onnx(out, weights, config, state)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{out}")\n'
        "# images: float32 [N, C, H, W] from 0 to 1\n"
        '(features,) = session.run(None, {"images": images})'
    )


def _write_safetensors(out: Path, weights: dict[str, Tensor], config: TrainConfig) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(
            "--format safetensors needs the package safetensors: pip install safetensors"
        ) from error
    about = {"method": config.method, "backbone": config.backbone, "format": "pt"}
    with replaced(out) as file:
        file.write(save(weights, about))


def _write_onnx(
    out: Path, weights: dict[str, Tensor], config: TrainConfig, state: dict[str, Any]
) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}: pip install onnx onnxscript"
        ) from error
    if "data" not in state:
        raise UserError(
            "--format onnx needs the size of the images, which checkpoints of older versions do "
            "not hold; resume the run for an epoch, or export it as torch"
        )
    size = (state["data"]["size"][0], state["data"]["size"][1])
    encoder = build_encoder(config, weights["mean"].flatten(), weights["std"].flatten(), size)
    load_encoder(encoder, {f"encoder.{name}": value for name, value in weights.items()})
    example = torch.zeros(2, weights["mean"].numel(), *size)
    with warnings.catch_warnings():  # what torch and onnxscript say about themselves
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            encoder.eval(),
            (example,),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("images_in_batch")},),
            dynamo=True,
            verbose=False,
        )
    with replaced(out) as file:
        file.write(program.model_proto.SerializeToString())  # type: ignore[union-attr]


def _torch_example(read: str, config: TrainConfig, channels: int) -> str:
    """How to load weights into the backbone alone."""
    name, _, attribute = config.backbone.partition(":")
    if name == "resnet":
        c = config
        sizes = (channels, c.width, c.stages, c.blocks, c.stem_stride, c.pool)
        lines = [
            "from ssltrain.models import SmallResNet",
            f"backbone = SmallResNet({', '.join(map(str, sizes))})",
        ]
    elif name == "timm":
        lines = [
            "import timm",
            f'backbone = timm.create_model("{attribute}", in_chans={channels}, num_classes=0)',
        ]
    else:
        lines = [f"from {name} import {attribute}", f"backbone = {attribute}({channels})"]
    loader = ["from safetensors.torch import load_file"] if read.startswith("load_file") else []
    return "\n".join(
        [
            "import torch",
            *loader,
            *lines,
            f"weights = {read}",
            'own = {k[9:]: v for k, v in weights.items() if k.startswith("backbone.")}',
            "backbone.load_state_dict(own)",
            "backbone.eval()",
            f"# images: float32 [N, {channels}, H, W] from 0 to 1",
            'features = backbone((images - weights["mean"]) / weights["std"])',
        ]
    )
