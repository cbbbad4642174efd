# SPDX-License-Identifier: Apache-2.0
"""Where the memory of a run goes: predicted by parts, then measured in fresh processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import DataOptions, ImageData, Part, Subset, load
from ssltrain.errors import UserError
from ssltrain.methods import CLIP, Batch, SimCLR
from ssltrain.parallel import World, choose_device
from ssltrain.plots import CLASS_STYLES, INK, new_figure, plain, tidy
from ssltrain.runs import epoch_order
from ssltrain.trainer import Trainer

BACKENDS = {"fused": "sslkernels", "eager": "plain PyTorch"}
PARTS = ("weights", "gradients", "optimiser", "average", "queue", "activations", "loss")
MEBIBYTE = 2**20
SAMPLE = (4, 8)  # images of the two forward passes that the activations are extrapolated from
# Matrices of logits that plain PyTorch holds at once at its peak: two or three from the forward pass, the
# gradients of two in the backward pass (SimCLR measures 4.3 at 4096 and at 8192 rows).
EAGER_MATRICES = 4
PASSING_TENSORS = 3  # of the largest size, that a forward pass without gradient holds at once
IN_PARTS = ("simclr", "supcon", "moco3", "clip")  # --micro-batch goes through cached_step
KEPT_LOGITS = 4 * MEBIBYTE  # what the fused losses may keep of small batches


# ---- prediction ----------------------------------------------------------------------------------


def predict(trainer: Trainer) -> dict[str, int]:
    """Bytes of each of PARTS at the peak of a step, from sizes and two small forward passes."""
    config, method = trainer.config, trainer.method
    weights = _bytes(method.online)
    trained = sum(p.numel() * p.element_size() for p in method.online.parameters())
    states = 2 if config.optimizer == "adamw" else int(config.momentum > 0)
    target = getattr(method, "target", None)
    queue = getattr(method, "queue", None)
    views = 2 + config.crops
    together = config.micro_batch or config.batch_size
    in_parts = bool(config.micro_batch) and config.method in IN_PARTS
    if config.method == "moco":
        views = 2 if config.symmetric and not config.micro_batch else 1
    if config.method == "clip":  # a view and its caption
        views = 1
    per_view, largest = activations_of_a_view(trainer)
    passing = 0
    if config.method == "byol":  # the target's forward pass, while the online one is kept
        passing = PASSING_TENSORS * largest * views * together
    rows, columns = logits_shape(config)
    if config.loss_backend == "eager":
        loss = EAGER_MATRICES * rows * columns * 4
    else:
        loss = min(rows * columns * 4, KEPT_LOGITS)
    loss += 4 * (rows + columns * (config.method != "moco")) * config.projector_dim * 4
    return {
        "weights": weights,
        "gradients": trained,
        "optimiser": states * trained,
        "average": 0 if target is None else _bytes(target),
        "queue": 0 if queue is None else _bytes(queue),
        "activations": per_view * together * (1 if in_parts else views) + passing,
        "loss": loss,
    }


def logits_shape(config: TrainConfig) -> tuple[int, int]:
    """Rows and columns of the logits of one loss; zeros for methods without negatives."""
    batch, views = config.batch_size, 2 + config.crops
    if config.method in ("simclr", "supcon"):
        return views * batch, views * batch
    if config.method == "moco":
        together = config.micro_batch or batch * (2 if config.symmetric else 1)
        return together, config.queue_size + 1
    if config.method in ("moco3", "clip"):
        return batch, batch
    together = config.micro_batch or batch  # byol, simsiam: logits of the metrics only
    return together, together


def _bytes(module: torch.nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def activations_of_a_view(trainer: Trainer) -> tuple[int, int]:
    """Bytes that one view of one image keeps for the backward pass, and its largest tensor.

    With its caption, where the method has captions.
    """
    channels, size = trainer.data.channels, trainer.data.size
    found, largest = [], []
    own = {p.untyped_storage().data_ptr() for p in trainer.method.online.parameters()}
    kept = {name: buffer.clone() for name, buffer in trainer.method.named_buffers()}
    for count in SAMPLE:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = [torch.rand(count, channels, *size, device=trainer.world.device)]
        if trainer.tokens is not None:
            inputs.append(trainer.tokens[:count].to(trainer.world.device))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with trainer.method.autocast():
                out = trainer.method.online(*inputs)
        found.append(sum(storages.values()))
        largest.append(max(storages.values()))
        del out
    for name, buffer in trainer.method.named_buffers():
        buffer.copy_(kept[name])
    more = SAMPLE[1] - SAMPLE[0]
    return (found[1] - found[0]) // more, (largest[1] - largest[0]) // more


# ---- measurement ---------------------------------------------------------------------------------


class Meter:
    """Peak of the memory of this process (Linux), or of a CUDA device, above a beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        """What is held now is the beginning."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
            self._before = _status("VmRSS")
        except OSError as error:
            raise UserError(
                "ssltrain memory measures a CPU run by /proc/self/clear_refs of Linux, which "
                f"cannot be used here: {error.strerror}"
            ) from error

    def peak(self) -> int:
        """The most that was held since ``begin``, above it, in bytes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(_status("VmHWM") - self._before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise UserError(f"ssltrain memory needs {field} in /proc/self/status, which is not there")


def probe(config: TrainConfig) -> dict[str, Any]:
    """Predict and measure one run in this process, which should have done nothing else.

    Returns:
        ``predicted``: bytes of PARTS; ``step``: the peak of two steps above what the process held
        before the network was built; ``loss``: the peak of forward and backward pass of the loss.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    data = load(config.data, DataOptions.of(config))
    _repeat(data, config.batch_size)
    # What the first use of libraries takes is not the run's: a small run comes first.
    size = min(config.batch_size, 8)
    small = dataclasses.replace(config, batch_size=size, micro_batch=0, queue_size=16)
    _steps(Trainer(small, data, World(0, 1, device), None))
    meter = Meter(device)
    meter.begin()
    trainer = Trainer(config, data, World(0, 1, device), None)
    _steps(trainer)
    step = meter.peak()
    predicted = predict(trainer)
    loss_alone(trainer, rows=8)()
    loss = loss_alone(trainer)
    meter.begin()
    loss()
    return {"predicted": predicted, "step": step, "loss": meter.peak()}


def _repeat(data: ImageData, count: int) -> None:
    """Give the training part as many images as a batch takes, by repeating them."""
    part = data.train
    if len(part) < count:
        rows = np.arange(count) % len(part)
        data.train = Part(
            Subset(part.images, torch.from_numpy(rows)),
            None if part.labels is None else part.labels[rows],
            part.names[rows],
            part.sizes[rows],
            part.title,
            None if part.captions is None else [part.captions[row] for row in rows],
        )


def _steps(trainer: Trainer) -> None:
    """Two steps: the state of the optimiser is made in the first."""
    order = epoch_order(len(trainer.data.train), trainer.config.seed, 0)
    view = trainer._batch(order, 0).view_1
    trainer.method.prime(itertools.repeat(view))  # until the queue, where there is one, is full
    for _ in range(2):
        trainer._step(order, 0)


def loss_alone(trainer: Trainer, rows: int = 0) -> Callable[[], None]:
    """Forward and backward pass of the loss on random embeddings of the size of the run.

    Args:
        trainer: the run.
        rows: how many embeddings instead, and keys in the queue; 0 for those of the run.

    Returns:
        What does it; the embeddings are made by now.
    """
    config, method, device = trainer.config, trainer.method, trainer.world.device
    count, dim, t = rows or config.batch_size, config.projector_dim, config.temperature
    if not rows and config.method in ("moco", "byol", "simsiam"):
        count = logits_shape(config)[0]
    a, b = (torch.randn(count, dim, device=device, requires_grad=True) for _ in range(2))
    more = [torch.randn(count, dim, device=device) for _ in range(config.crops)]
    labels = torch.arange(count, device=device) % 10
    queue = None
    if config.method == "moco":
        queue = torch.randn(rows or config.queue_size, dim, device=device)
        queue = queue.bfloat16() if config.queue_dtype == "bf16" else queue

    def run() -> None:
        if isinstance(method, SimCLR):  # and SupCon
            loss, _ = method.loss([a, b, *more], Batch(a, b, labels=labels))
        elif isinstance(method, CLIP):
            loss, _ = method.loss(a, b, torch.tensor(1 / t, device=device, requires_grad=True))
        elif config.method in ("moco", "moco3"):
            loss, _ = method.ops.info_nce_loss(a, b.detach(), queue, t, return_metrics=True)
        elif config.method == "byol":
            loss = method.ops.byol_loss(a, b.detach())
        else:
            loss = method.ops.simsiam_loss(a, b.detach(), b, a.detach())
        loss.backward()

    return run


def measure(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """``probe`` in a fresh process for each of BACKENDS.

    Raises:
        UserError: a process failed; the message is what it said last.
    """
    found = {}
    for backend in BACKENDS:
        own = dataclasses.replace(config, loss_backend=backend)  # type: ignore[arg-type]
        roots = [str(Path(__file__).resolve().parents[1]), *sys.path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
            # Large blocks come from the system and go back to it, so that the peak is that of use.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        done = subprocess.run(
            [sys.executable, "-m", "ssltrain.memory"],
            input=json.dumps(dataclasses.asdict(own)),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"the run with --loss-backend {backend} could not be measured: {last}")
        found[backend] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- table and picture ---------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]]) -> str:
    """Predicted parts, and what was measured, in MiB."""
    lines = [f"{'MiB':<26}" + "".join(f"{BACKENDS[name]:>16}" for name in found)]

    def row(title: str, values: list[float]) -> None:
        cells = "".join(f"{value / MEBIBYTE:>16,.1f}" for value in values)
        lines.append(f"{title:<26}{cells}")

    for part in PARTS:
        row(f"predicted: {part}", [own["predicted"][part] for own in found.values()])
    row("predicted: all", [sum(own["predicted"].values()) for own in found.values()])
    row("measured: a step", [own["step"] for own in found.values()])
    row("measured: the loss alone", [own["loss"] for own in found.values()])
    return "\n".join(lines)


def draw(out: Path, config: TrainConfig, data_name: str, found: dict[str, dict[str, Any]]) -> None:
    """Draw the predicted parts as bars, and the measured peak as a mark on each."""
    figure = new_figure(9, 3.4)
    axes = figure.subplots()
    drawn = [part for part in PARTS if any(own["predicted"][part] for own in found.values())]
    for line, own in enumerate(found.values()):
        begin = 0.0
        for part in drawn:
            width = own["predicted"][part] / MEBIBYTE
            colour, _ = CLASS_STYLES[PARTS.index(part)]
            axes.barh(
                line,
                width,
                left=begin,
                color=colour,
                height=0.55,
                lw=0,
                label=part if line == 0 else None,
            )
            begin += width
        axes.plot(
            [own["step"] / MEBIBYTE] * 2,
            [line - 0.36, line + 0.36],
            color=INK,
            lw=2.4,
            label="measured" if line == 0 else None,
        )
    axes.set_yticks(range(len(found)), [BACKENDS[name] for name in found], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("MiB at the peak of a step, above the process before it", color=INK)
    micro = f", micro-batches of {config.micro_batch}" if config.micro_batch else ""
    axes.set_title(
        f"{TITLES[config.method]} on {plain(data_name)}, batch {config.batch_size}{micro}",
        color=INK,
        fontsize=11,
    )
    tidy(axes)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    figure.legend(
        loc="outside lower center",
        ncols=len(drawn) + 1,
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.2,
    )
    figure.savefig(out)


def main() -> int:
    """What the fresh process does: a configuration from stdin, ``probe`` to stdout, as JSON."""
    try:
        print(json.dumps(probe(TrainConfig(**json.load(sys.stdin)))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
