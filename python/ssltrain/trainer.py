# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches, steps, schedules, logs, checkpoints."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from types import FrameType
from typing import Any, NamedTuple

import torch
from tensorboardX import SummaryWriter
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ssltrain.augment import TwoViews
from ssltrain.config import TrainConfig
from ssltrain.data import ImageData, Images, check_resumed, fingerprint
from ssltrain.diagnostics import collapse
from ssltrain.errors import UserError, note
from ssltrain.methods import Batch, StepMetrics, build_method, online_weights
from ssltrain.models import Encoder, build_encoder
from ssltrain.optim import build_optimizer, build_schedule, set_step
from ssltrain.parallel import World
from ssltrain.runs import (
    RunFolder,
    epoch_order,
    random_state,
    seed_everything,
    set_random_state,
)

STATISTICS_IMAGES = 4096  # images that the channel means are taken over
DIAGNOSTIC_IMAGES = 512  # images that the collapse diagnostics are taken over
DIAGNOSTIC_SEED = 7  # of the views for the diagnostics, the same at every epoch


class Outcome(NamedTuple):
    """How a call of ``Trainer.fit`` ended."""

    finished: bool
    seconds: float
    images_per_s: float


def fresh_encoder(
    config: TrainConfig, data: ImageData, statistics: tuple[Tensor, Tensor] | None = None
) -> Encoder:
    """The encoder of a run before its first step: a function of the seed.

    Args:
        config: the run.
        data: its images.
        statistics: mean and standard deviation of each channel, where they are known already.
    """
    mean, std = statistics or channel_statistics(data.train.images)
    seed_everything(config.seed)
    return build_encoder(config, mean, std, data.size)


def channel_statistics(images: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 [C], of pixels from 0 to 1."""
    count = len(images)
    rows = torch.linspace(0, count - 1, min(count, STATISTICS_IMAGES)).round().long()
    pixels = images.read(rows).double() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return mean.float(), std.clamp_min(1e-3).float()  # 1e-3: a blank channel stays finite


class Trainer:
    """A run in progress: everything that a checkpoint holds, and the loop that moves it."""

    def __init__(
        self, config: TrainConfig, data: ImageData, world: World, folder: RunFolder | None
    ) -> None:
        """Build the run at its first step.

        Args:
            config: the run.
            data: its images.
            world: the processes that share it.
            folder: where the main process writes; None elsewhere.

        Raises:
            UserError: the batch is larger than the training part, or a micro-batch is one image.
        """
        images = len(data.train)
        if config.batch_size > images:
            raise UserError(
                f"--batch-size {config.batch_size} is larger than the {images} training images "
                f"of {data.name}; give at most {images}"
            )
        share = config.batch_size // world.size
        if (
            share == 1
            or config.micro_batch
            and 1 in (config.micro_batch, share % config.micro_batch)
        ):
            what = f"--micro-batch {config.micro_batch}" if share > 1 else "--batch-size"
            raise UserError(
                f"{what} leaves a part of one image, of which batch norm can take no statistics; "
                "give another"
            )
        self.config, self.data, self.world, self.folder = config, data, world, folder
        self.fingerprint = fingerprint(data)
        self.steps_per_epoch = images // config.batch_size  # what is left over sits an epoch out
        self.total_steps = config.epochs * self.steps_per_epoch
        encoder = fresh_encoder(config, data)
        self.method = build_method(config, encoder, world, self.total_steps)
        self.method.train()
        if self.method.needs_labels and data.train.labels is None:
            raise UserError(f"{config.method} trains on labels, and {data.name} {data.unlabelled}")
        self.optimizer = build_optimizer(config, self.method.online, self.method.fixed_rate())
        self.schedule = build_schedule(self.optimizer, config, self.total_steps)
        self.views = TwoViews(config, data.channels, data.size)
        self.sums = torch.zeros(len(StepMetrics._fields), device=world.device)
        # Every process draws its own views; the weights above came from the same seed in all.
        seed_everything(config.seed + 1_000_003 * (world.rank + 1))
        self._stop = False

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.method.step == self.total_steps

    def start_from(self, state: dict[str, Any]) -> None:
        """Begin with the weights in the checkpoint of another run.

        Raises:
            UserError: it is of another encoder.
        """
        fresh = self.method.start_from(online_weights(state["method"]))
        if fresh:
            note(f"{' and '.join(fresh)} of the other run do not fit and start afresh")

    # ---- checkpoints -------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint from which ``restore`` continues bit for bit."""
        random_states = self.world.gather(random_state(self.world.device))
        if self.folder is None:
            return
        self.folder.write_checkpoint(
            {
                "config": dataclasses.asdict(self.config),
                "step": self.method.step,
                "steps_per_epoch": self.steps_per_epoch,
                "data": self.fingerprint,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.method.scaler.state_dict(),
                "sums": self.sums,
                "random": random_states,
            }
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it belongs to another network, other data or another number of processes,
                or has more steps than the run.
        """
        check_resumed(state.get("data"), self.data, self.config.accept_changed_data)
        if len(state["random"]) != self.world.size:
            raise UserError(
                f"the run was made by {len(state['random'])} processes and must be resumed by as "
                f"many, got {self.world.size}"
            )
        try:
            self.method.load_state_dict(state["method"])
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint does not fit the network: {str(error).splitlines()[0]}"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        step, steps_per_epoch = state["step"], state.get("steps_per_epoch", self.steps_per_epoch)
        same_epochs = steps_per_epoch == self.steps_per_epoch
        if not same_epochs:  # other data: from the start of the epoch that was under way
            step = step // steps_per_epoch * self.steps_per_epoch
        if step > self.total_steps:
            raise UserError(
                f"the run is in epoch {-(-step // self.steps_per_epoch)}; --epochs must be at least "
                f"that, got {self.config.epochs}"
            )
        self.schedule.load_state_dict(state["schedule"])
        self.method.scaler.load_state_dict(state.get("scaler", {}))
        set_step(self.schedule, step)
        self.method.step = step
        if same_epochs:
            self.sums.copy_(state["sums"])
        set_random_state(state["random"][self.world.rank], self.world.device)

    # ---- the loop ----------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the end, or to ``stop_after`` or an interrupt; write logs and checkpoints."""
        first = self.method.step
        last = self.total_steps
        if self.config.stop_after:
            last = min(last, first + self.config.stop_after)
        start_epoch = first // self.steps_per_epoch
        if self.folder is not None:
            self.folder.keep_metrics_before(start_epoch)
        started = time.perf_counter()
        events = self._open_events(first)
        bar = tqdm(
            total=self.total_steps,
            initial=first,
            unit="step",
            disable=not (self.config.progress and self.folder is not None),
            desc=self.config.method,
            dynamic_ncols=True,
            # A log file gets a line of the bar now and then, a terminal sees it move.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )
        previous = signal.signal(signal.SIGINT, self._ask_to_stop)
        previous_term = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            if first == 0:
                # An order that no epoch has; a generator, so that only what is used is read.
                order = epoch_order(len(self.data.train), self.config.seed, self.config.epochs)
                self.method.prime(self._batch(order, i).view_1 for i in range(self.steps_per_epoch))
            for epoch in range(start_epoch, self.config.epochs):
                self._epoch(epoch, last, bar, events)
                if self.method.step >= last or self._stop:
                    break
        finally:
            signal.signal(signal.SIGINT, previous)
            signal.signal(signal.SIGTERM, previous_term)
            bar.close()
            if events is not None:
                events.close()
        self.save()
        seconds = time.perf_counter() - started
        images = (self.method.step - first) * self.config.batch_size
        return Outcome(self.finished, seconds, images / max(seconds, 1e-9))

    def _epoch(self, epoch: int, last: int, bar: tqdm[Any], events: SummaryWriter | None) -> None:
        """The steps of ``epoch`` that are still to do, at most to step ``last``."""
        done = self.method.step - epoch * self.steps_per_epoch
        order = epoch_order(len(self.data.train), self.config.seed, epoch)
        clock, marked = time.perf_counter(), self.method.step
        started = clock
        for position in range(done, self.steps_per_epoch):
            metrics = self._step(order, position)
            self.sums += torch.stack(metrics)
            bar.update()
            if self.method.step % self.config.log_every == 0:
                now = time.perf_counter()
                rate = (self.method.step - marked) * self.config.batch_size / (now - clock)
                clock, marked = now, self.method.step
                self._log_step(metrics, rate, bar, events)
            if self.method.step >= last or (self._stop and self.world.size == 1):
                break
        if self.method.step < (epoch + 1) * self.steps_per_epoch:
            return
        self._end_epoch(epoch, time.perf_counter() - started, self.steps_per_epoch - done, events)
        if self.world.size > 1:  # all processes stop at the same step or none does
            self._stop = any(self.world.gather(self._stop))
        if (epoch + 1) % self.config.save_every == 0 and self.method.step < last:
            self.save()

    def _step(self, order: Tensor, position: int) -> StepMetrics:
        """One optimiser step on the batch at ``position`` of ``order``."""
        metrics = self.method.train_step(self._batch(order, position))
        scaler = self.method.scaler
        if self.config.clip_grad:
            scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.method.online.parameters(), self.config.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        set_step(self.schedule, self.method.step)
        return metrics

    def _batch(self, order: Tensor, position: int) -> Batch:
        """Views of this process's part of the batch at ``position`` of ``order``."""
        share = self.config.batch_size // self.world.size
        begin = position * self.config.batch_size + self.world.rank * share
        rows = order[begin : begin + share]
        images = self.data.train.images.read(rows).to(self.world.device, non_blocking=True)
        view_1, view_2 = self.views(images)
        labels = None
        if self.method.needs_labels and self.data.train.labels is not None:
            labels = torch.from_numpy(self.data.train.labels)[rows].to(self.world.device)
        return Batch(view_1, view_2, self.views.small_views(images), labels)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    # ---- logs --------------------------------------------------------------------------------

    def _open_events(self, first: int) -> SummaryWriter | None:
        if self.folder is None:
            return None
        # purge_step hides what an interrupted run logged after the checkpoint it resumes from.
        purge = first + 1 if first else None
        return SummaryWriter(str(self.folder.events), purge_step=purge)

    def _log_step(
        self, metrics: StepMetrics, rate: float, bar: tqdm[Any], events: SummaryWriter | None
    ) -> None:
        values = self.world.mean(torch.stack(metrics)).tolist()
        named = dict(zip(StepMetrics._fields, values, strict=True))
        bar.set_postfix_str(
            f"loss {named['loss']:.3f}, top-1 {named['top1']:.1%}, {rate:,.0f} images/s"
        )
        if events is not None:
            for name, value in named.items():
                events.add_scalar(f"step/{name}", value, self.method.step)
            events.add_scalar("step/lr", self.schedule.get_last_lr()[0], self.method.step)
            events.add_scalar("step/images_per_s", rate, self.method.step)

    def _end_epoch(
        self, epoch: int, seconds: float, steps: int, events: SummaryWriter | None
    ) -> None:
        means = self.world.mean(self.sums / self.steps_per_epoch).tolist()
        self.sums.zero_()
        if self.folder is None:
            return
        row: dict[str, float] = {"epoch": epoch, "step": self.method.step}
        row["lr"] = float(self.schedule.get_last_lr()[0])
        row.update(dict(zip(StepMetrics._fields, means, strict=True)))
        row.update(self._diagnose())
        row["images_per_s"] = steps * self.config.batch_size / max(seconds, 1e-9)
        row["seconds"] = seconds
        self.folder.append_metrics(row)
        if events is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    events.add_scalar(f"epoch/{name}", value, epoch)

    @torch.no_grad()
    def _diagnose(self) -> dict[str, float]:
        """Collapse diagnostics; leaves weights, batch-norm buffers and generators as they were."""
        state = random_state(self.world.device)
        network = self.method.network
        network.eval()
        seed_everything(DIAGNOSTIC_SEED)
        count = len(self.data.train)
        rows = torch.linspace(0, count - 1, min(count, DIAGNOSTIC_IMAGES)).round().long()
        images = self.data.train.images.read(rows).to(self.world.device)
        view_1, view_2 = self.views(images)
        h = network.encoder(images.float() / 255)
        found = collapse(h, network(view_1), network(view_2))
        network.train()
        set_random_state(state, self.world.device)
        return {name: value.item() for name, value in found._asdict().items()}
