# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: TensorBoard events, the bar, lines for pipes and CI logs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar
from tqdm import tqdm

from ssltrain.errors import note

LINE_EVERY_S = 10.0  # where there is no terminal, an epoch gets a line at most this often


class Events:
    """TensorBoard's scalars, written by the thread that calls.

    tensorboardX's own writer has a thread and a queue of ten: when the thread dies of a full disk,
    the training waits for the queue for ever.
    """

    def __init__(self, folder: Path, purge_after: int) -> None:
        """Open a new file of events.

        Args:
            folder: where it goes.
            purge_after: the step that the run goes on from; later ones of older files are hidden.
        """
        self._writer: RecordWriter | None = None
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
            self._writer = RecordWriter(str(folder / name))
        except OSError as error:
            self._give_up(error)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_after:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_after + 1, session_log=start))

    def add(self, name: str, value: float, step: int) -> None:
        """Write one value."""
        self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Hand what was written to the system."""
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is left."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            self._give_up(error)

    def _write(self, event: Event) -> None:
        try:
            if self._writer is not None:
                self._writer.write(event.SerializeToString())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        note(f"no more TensorBoard events in {self._folder}: {error.strerror or error}")


class Progress:
    """A bar on a terminal; elsewhere a line at the end of an epoch, now and then."""

    def __init__(self, title: str, total: int, done: int, steps_per_epoch: int, show: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            desc=title,
            dynamic_ncols=True,
            mininterval=0.2,
            disable=not (show and terminal),
        )
        self._lines = show and not terminal
        self._title, self._total, self._steps_per_epoch = title, total, steps_per_epoch
        self._started, self._first, self._spoke = time.perf_counter(), done, 0.0

    def step(self) -> None:
        """A step is done."""
        self._bar.update()

    def say(self, text: str) -> None:
        """What the last steps were like, beside the bar."""
        self._bar.set_postfix_str(text)

    def epoch(self, step: int, text: str) -> None:
        """An epoch has ended at ``step``."""
        now = time.perf_counter()
        if not self._lines or (now - self._spoke < LINE_EVERY_S and step < self._total):
            return
        self._spoke = now
        left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
        epochs = self._total // self._steps_per_epoch
        print(
            f"{self._title}: epoch {step // self._steps_per_epoch} of {epochs}: {text}"
            + (f"; {left:,.0f} s left" if step < self._total else ""),
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """No more steps."""
        self._bar.close()
