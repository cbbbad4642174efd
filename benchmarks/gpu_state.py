# SPDX-License-Identifier: Apache-2.0
"""The state of a GPU while it is measured: driver, clocks, power, temperature, as nvidia-smi gives them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

ABSENT = "not known"
# What nvidia-smi calls it, and what a report does.
FIELDS = {
    "driver_version": "driver",
    "persistence_mode": "persistence mode",
    "compute_mode": "compute mode",
    "mig.mode.current": "MIG",
    "ecc.mode.current": "ECC",
    "pstate": "performance state",
    "clocks.current.sm": "SM clock",
    "clocks.max.sm": "highest SM clock",
    "clocks.applications.graphics": "application clock",
    "clocks.current.memory": "memory clock",
    "power.draw": "power",
    "power.limit": "power limit",
    "temperature.gpu": "temperature",
    "utilization.gpu": "busy",
    "clocks_throttle_reasons.active": "reasons for lower clocks",
}
# Those that change while it works.
MOVING = ("SM clock", "memory clock", "power", "temperature", "reasons for lower clocks")
_SECONDS = 20.0  # of one call of nvidia-smi; a driver that hangs must not stop the report


def _ask(command: list[str]) -> str:
    """What it prints; "" if it can not be run, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def state(name: str, ask: Callable[[list[str]], str] = _ask) -> dict[str, str]:
    """Every entry of ``FIELDS`` of one GPU; what is not known says so.

    Args:
        name: What nvidia-smi selects it by: its UUID, or its number.
        ask: Runs a command and returns what it prints.
    """
    tool = shutil.which("nvidia-smi") or "nvidia-smi"

    def query(fields: list[str]) -> list[str]:
        options = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={name}"]
        values = [value.strip() for value in ask([tool, *options]).strip().split(",")]
        return values if len(values) == len(fields) and all(values) else []

    values = query(list(FIELDS))
    if not values:  # one unknown field fails the query of all
        values = [(query([field]) or [ABSENT])[0] for field in FIELDS]
    known = (ABSENT if value in ("[N/A]", "[Not Supported]", "N/A") else value for value in values)
    return dict(zip(FIELDS.values(), known, strict=True))


def line(found: dict[str, str], names: tuple[str, ...] = tuple(FIELDS.values())) -> str:
    """One line of a report."""
    return ", ".join(f"{name} {found[name]}" for name in names)
