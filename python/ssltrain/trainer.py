# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches, steps, schedules, logs, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from sslkernels import StratifiedSampler
from ssltrain.augment import TwoViews
from ssltrain.config import TrainConfig
from ssltrain.data import ImageData, Images, check_captions, check_resumed, fingerprint
from ssltrain.diagnostics import COLLAPSED_EPOCHS, WHAT_HELPS, collapse, has_collapsed
from ssltrain.errors import UserError, note
from ssltrain.logs import Events, Progress
from ssltrain.methods import Batch, StepMetrics, build_method, named_for, online_weights
from ssltrain.models import Encoder, build_encoder
from ssltrain.neighbours import nearest, vote
from ssltrain.optim import build_optimizer, build_schedule, set_step
from ssltrain.parallel import World, choose_amp
from ssltrain.runs import (
    RunFolder,
    epoch_order,
    random_state,
    seed_everything,
    set_random_state,
)
from ssltrain.text import tokenize

STATISTICS_IMAGES = 4096  # images that the channel means are taken over
DIAGNOSTIC_IMAGES = 512  # images that the collapse diagnostics are taken over
KNN_IMAGES = 2000  # training images that the online k-NN is taken over
NEIGHBOURS = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DIAGNOSTIC_SEED = 7  # of the views for the diagnostics, the same at every epoch


class Outcome(NamedTuple):
    """How a call of ``Trainer.fit`` ended."""

    finished: bool
    seconds: float
    images_per_s: float
    signal: int  # the number of the one that stopped it, 0 for none


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


def spread(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of ``rows``, int64 [N], spread evenly."""
    places = torch.linspace(0, len(rows) - 1, min(len(rows), count)).round().long()
    return rows[places]


def channel_statistics(images: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 [C], of pixels from 0 to 1."""
    rows = spread(torch.arange(len(images)), STATISTICS_IMAGES)
    pixels = images.read(rows).double() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return mean.float(), std.clamp_min(1e-3).float()  # 1e-3: a blank channel stays finite


def check_parts(config: TrainConfig, processes: int) -> None:
    """Raise a UserError where a process or a micro-batch would have one image: known before any is read."""
    share = config.batch_size // processes
    if share == 1 or config.micro_batch and 1 in (config.micro_batch, share % config.micro_batch):
        what = f"--micro-batch {config.micro_batch}" if share > 1 else "--batch-size"
        raise UserError(
            f"{what} leaves a part of one image, of which batch norm can take no statistics; "
            "give another"
        )


class Trainer:
    """A run in progress: everything that a checkpoint holds, and the loop that moves it."""

    def __init__(
        self, config: TrainConfig, data: ImageData, world: World, folder: RunFolder | None
    ) -> None:
        """Build the run at its first step.

        Args:
            config: the run; ``self.config`` says what ``amp="auto"`` became.
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
        check_parts(config, world.size)
        config = dataclasses.replace(config, amp=choose_amp(config.amp, world))
        self.config, self.data, self.world, self.folder = config, data, world, folder
        self.fingerprint = fingerprint(data)
        self.steps_per_epoch = images // config.batch_size  # what is left over sits an epoch out
        self.total_steps = config.epochs * self.steps_per_epoch
        encoder = fresh_encoder(config, data)
        self.method = build_method(config, encoder, world, self.total_steps, data.size)
        self.method.train()
        if self.method.needs_labels and data.train.labels is None:
            raise UserError(f"{config.method} trains on labels, and {data.name} {data.unlabelled}")
        self.sampler = None
        if config.sampler == "stratified":
            if data.train.labels is None:
                raise UserError(
                    f"--sampler stratified needs classes, and {data.name} has no labels"
                )
            # One sequence for all: each process takes its part of each batch of it.
            self.sampler = StratifiedSampler(
                data.train.labels, seed=config.seed, rank=0, world_size=1
            )
        self.tokens = None
        if self.method.needs_captions:
            self.tokens = tokenize(check_captions(data.train, data.name))
        self.optimizer = build_optimizer(config, self.method.online, self.method.fixed_rate())
        self.schedule = build_schedule(self.optimizer, config, self.total_steps)
        self.views = TwoViews(config, data.channels, data.size)
        self.sums = torch.zeros(len(StepMetrics._fields), device=world.device)
        # Every process draws its own views; the weights above came from the same seed in all.
        seed_everything(config.seed + 1_000_003 * (world.rank + 1))
        self.best_knn = 0.0
        self._signal = 0  # the one that asked to stop
        self._agreed = False  # that all processes stop
        self._collapsed = 0  # epochs in a row
        self.events: Events | None = None

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

    def dry_run(self) -> str:
        """Take one step, and say what the run would be."""
        config, data = self.config, self.data
        started = time.perf_counter()
        order = self._order(0)
        self.method.prime([self._batch(order, 0).view_1])
        self._step(order, 0)  # the first step also sets up what later ones use again
        started = time.perf_counter()
        self._step(order, min(1, self.steps_per_epoch - 1))
        seconds = time.perf_counter() - started
        network = self.method.network
        weights, encoder = (
            sum(p.numel() for p in module.parameters()) for module in (network, network.encoder)
        )
        classes = f"{len(data.class_names)} classes" if data.has_labels else data.unlabelled
        sizes = " x ".join(map(str, (data.channels, *data.size)))
        return (
            f"{config.method} on {data.name} ({data.kind}): {len(data.train)} training and "
            f"{len(data.test)} test images of {sizes}, {classes}\n"
            f"{config.backbone}: {encoder / 1e6:.2f} million weights, {network.encoder.dim} "
            f"features; with the projector {weights / 1e6:.2f} million\n"
            f"{config.epochs} epochs of {self.steps_per_epoch} steps of {config.batch_size} images: "
            f"{self.total_steps} steps on {self.world.device}, about {seconds * 1000:.0f} ms each, "
            f"{self.total_steps * seconds / 60:.1f} minutes in all\n"
            "nothing was written"
        )

    # ---- checkpoints -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What an evaluation needs: settings, data, weights."""
        return {
            "config": dataclasses.asdict(self.config),
            "step": self.method.step,
            "steps_per_epoch": self.steps_per_epoch,
            "data": self.fingerprint,
            "method": self.method.state_dict(),
        }

    def save(self, *paths: Path) -> None:
        """Write checkpoints from which ``restore`` continues bit for bit; all processes call this.

        Args:
            paths: where to; without one, the latest checkpoint.

        Raises:
            OSError: it cannot be written; older checkpoints are what they were.
        """
        random_states = self.world.gather(random_state(self.world.device))
        sums = self.world.mean(self.sums)
        if self.folder is None:
            return
        state = self.state() | {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.method.scaler.state_dict(),
            "sums": sums,
            "best_knn": self.best_knn,
            "random": random_states,
        }
        for path in paths or (self.folder.checkpoint,):
            self.folder.write_checkpoint(state, path)

    def _save_on_the_way(self, *paths: Path) -> None:
        """Save; a full disk costs this checkpoint and no more."""
        try:
            self.save(*paths)
        except OSError as error:
            note(f"no checkpoint was written at step {self.method.step}: {error.strerror or error}")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        With another number of processes than before, the images of each batch stay what they were
        to be; their views are drawn anew.

        Raises:
            UserError: it belongs to another network or other data, or has more steps than the run.
        """
        check_resumed(state.get("data"), self.data, self.config.accept_changed_data)
        before, size = len(state["random"]), self.world.size
        if before != size and self.world.is_main:
            note(
                f"the run was made by {before} processes and goes on with {size}: views are drawn "
                "anew from here on, and batch norm that is not over all processes sees "
                f"{self.config.batch_size // size} images instead of "
                f"{self.config.batch_size // before}"
            )
        try:
            self.method.load_state_dict(named_for(size, state["method"]))
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
        self.best_knn = state.get("best_knn", 0.0)
        if same_epochs:
            self.sums.copy_(state["sums"])
        if before == size:
            set_random_state(state["random"][self.world.rank], self.world.device)
        else:  # what no process has drawn before
            seed_everything(self.config.seed + 1_000_003 * (self.world.rank + 1 + before * step))

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
        self.events = None if self.folder is None else Events(self.folder.events, first)
        self.progress = Progress(
            self.config.method,
            self.total_steps,
            first,
            self.steps_per_epoch,
            show=self.config.progress and self.folder is not None,
        )
        kept = {number: signal.signal(number, self._ask_to_stop) for number in STOP_SIGNALS}
        try:
            if first == 0:
                self._save_on_the_way()  # a run can be resumed from its first moment on
                # An order that no epoch has; a generator, so that only what is used is read.
                order = self._order(self.config.epochs)
                self.method.prime(self._batch(order, i).view_1 for i in range(self.steps_per_epoch))
            for epoch in range(start_epoch, self.config.epochs):
                self._epoch(epoch, last)
                if self.method.step >= last or self._signal:
                    break
            try:
                self.save()
            except OSError as error:
                raise UserError(
                    f"the last checkpoint could not be written: {error.strerror or error}; make "
                    "room and resume from the one before"
                ) from error
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
            self.progress.close()
            if self.events is not None:
                self.events.close()
        seconds = time.perf_counter() - started
        images = (self.method.step - first) * self.config.batch_size
        rate = images / max(seconds, 1e-9)
        return Outcome(self.finished, seconds, rate, 0 if self.finished else self._signal)

    def _epoch(self, epoch: int, last: int) -> None:
        """The steps of ``epoch`` that are still to do, at most to step ``last``."""
        done = self.method.step - epoch * self.steps_per_epoch
        order = self._order(epoch)
        clock, marked = time.perf_counter(), self.method.step
        started = clock
        for position in range(done, self.steps_per_epoch):
            metrics = self._step(order, position)
            self.sums += torch.stack(metrics)
            self.progress.step()
            if self.method.step % self.config.log_every == 0:
                now = time.perf_counter()
                rate = (self.method.step - marked) * self.config.batch_size / (now - clock)
                clock, marked = now, self.method.step
                self._log_step(metrics, rate)
                self._agree_on_stopping()
            if self.method.step >= last or (self._signal and self.world.size == 1):
                break
            if self._agreed:
                break
        if self.method.step < (epoch + 1) * self.steps_per_epoch:
            return
        self._end_epoch(epoch, time.perf_counter() - started, self.steps_per_epoch - done)
        self._agree_on_stopping()
        # The latest comes last: a run that is killed between the two goes on from before both.
        if self.config.keep_every and (epoch + 1) % self.config.keep_every == 0:
            folder = self.folder
            self._save_on_the_way(*([folder.epoch_checkpoint(epoch + 1)] if folder else []))
        if (epoch + 1) % self.config.save_every == 0 and self.method.step < last:
            self._save_on_the_way()

    def _order(self, epoch: int) -> Tensor:
        """Row numbers of the images of an epoch, int64 [N]: a function of seed and epoch."""
        if self.sampler is not None:
            return self.sampler.draw(epoch)
        return epoch_order(len(self.data.train), self.config.seed, epoch)

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
        tokens = None if self.tokens is None else self.tokens[rows].to(self.world.device)
        return Batch(view_1, view_2, self.views.small_views(images), labels, tokens)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """The first signal stops after the step, with a checkpoint; the second at once."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number

    def _agree_on_stopping(self) -> None:
        """Of many processes all stop at the same step, or none does."""
        if self.world.size > 1:
            self._signal = max(self.world.gather(self._signal))
            self._agreed = self._signal != 0

    # ---- logs --------------------------------------------------------------------------------

    def _log_step(self, metrics: StepMetrics, rate: float) -> None:
        values = self.world.mean(torch.stack(metrics)).tolist()
        named = dict(zip(StepMetrics._fields, values, strict=True))
        self._check_loss(named["loss"])
        self.progress.say(
            f"loss {named['loss']:.3f}, top-1 {named['top1']:.1%}, similarity "
            f"{named['positive_similarity']:.2f} and {named['negative_similarity']:.2f}, "
            f"{rate:,.0f} images/s"
        )
        if self.events is not None:
            for name, value in named.items():
                self.events.add(f"step/{name}", value, self.method.step)
            self.events.add("step/lr", float(self.schedule.get_last_lr()[0]), self.method.step)
            self.events.add("step/images_per_s", rate, self.method.step)

    def _check_loss(self, loss: float) -> None:
        """A loss that is no number never comes back; what was saved before is kept."""
        if not math.isfinite(loss) and not self.method.scaler.is_enabled():
            raise UserError(
                f"the loss is {loss} at step {self.method.step}, so the run has stopped; what "
                "usually helps: a lower --base-lr, a longer --warmup, --clip-grad 1"
            )

    def _end_epoch(self, epoch: int, seconds: float, steps: int) -> None:
        means = self.world.mean(self.sums / self.steps_per_epoch).tolist()
        self.sums.zero_()
        self._check_loss(means[0])
        if self.folder is None:
            return
        row: dict[str, float] = {"epoch": epoch, "step": self.method.step}
        row["lr"] = float(self.schedule.get_last_lr()[0])
        row.update(dict(zip(StepMetrics._fields, means, strict=True)))
        every = self.config.knn_every
        found = self._diagnose(knn=every > 0 and (epoch + 1) % every == 0)
        row.update(found)
        row["images_per_s"] = steps * self.config.batch_size / max(seconds, 1e-9)
        row["seconds"] = seconds
        try:
            self.folder.append_metrics(row)
        except OSError as error:
            note(f"epoch {epoch} is missing in {self.folder.metrics}: {error.strerror or error}")
        if self.events is not None:
            for name, value in row.items():
                if name not in ("epoch", "step") and not math.isnan(value):
                    self.events.add(f"epoch/{name}", value, epoch)
            self.events.flush()
        self._warn_of_collapse(found)
        knn = "" if math.isnan(found["knn"]) else f", k-NN {found['knn']:.1%}"
        self.progress.epoch(
            self.method.step,
            f"loss {row['loss']:.3f}, top-1 {row['top1']:.1%}{knn}, spread "
            f"{row['feature_std']:.2f}, rank {row['effective_rank']:.1f}, "
            f"{row['images_per_s']:,.0f} images/s",
        )
        if found["knn"] > self.best_knn:
            self.best_knn = found["knn"]
            try:
                self.folder.write_checkpoint(self.state(), self.folder.best)
            except OSError as error:
                note(f"{self.folder.best} was not written: {error.strerror or error}")

    def _warn_of_collapse(self, found: dict[str, float]) -> None:
        names = ("feature_std", "effective_rank", "uniformity")
        std, rank, uniformity = (found[name] for name in names)
        collapsed = has_collapsed(std, rank, uniformity)
        self._collapsed = self._collapsed + 1 if collapsed else 0
        if self._collapsed == COLLAPSED_EPOCHS:
            note(
                f"the run has collapsed at step {self.method.step}, images are hardly told apart: "
                f"spread of features {std:.3f} (0 is all in one place), effective rank {rank:.2f}, "
                f"uniformity of projections {uniformity:.3f}; what usually helps: "
                f"{WHAT_HELPS[self.config.method]}"
            )

    @torch.no_grad()
    def _diagnose(self, knn: bool) -> dict[str, float]:
        """Collapse diagnostics and, where asked, the accuracy of neighbours, else nan.

        Leaves weights, batch-norm buffers and generators as they were.
        """
        state = random_state(self.world.device)
        network = self.method.network
        network.eval()
        seed_everything(DIAGNOSTIC_SEED)
        rows = spread(torch.arange(len(self.data.train)), DIAGNOSTIC_IMAGES)
        images = self.data.train.images.read(rows).to(self.world.device)
        view_1, view_2 = self.views(images)
        h = network.encoder(images.float() / 255)
        found = collapse(h, network(view_1), network(view_2))
        accuracy = self._online_knn() if knn else math.nan
        network.train()
        set_random_state(state, self.world.device)
        return {name: value.item() for name, value in found._asdict().items()} | {"knn": accuracy}

    def _online_knn(self) -> float:
        """How often neighbours of a training image have its class; nan without labels."""
        if self.data.train.labels is None or self.data.unlabelled:
            return math.nan
        labels = torch.from_numpy(self.data.train.labels)
        rows = spread(torch.from_numpy(self.data.train.labelled), KNN_IMAGES)
        h = [
            self.method.encoder(
                self.data.train.images.read(part).to(self.world.device).float() / 255
            )
            for part in rows.split(DIAGNOSTIC_IMAGES)
        ]
        bank, truth = torch.cat(h), labels[rows].to(self.world.device)
        count = min(NEIGHBOURS, len(bank) - 1)
        similarities, found = nearest(bank, bank, count, leave_out_self=True)
        return (vote(similarities, truth[found]) == truth).double().mean().item()
