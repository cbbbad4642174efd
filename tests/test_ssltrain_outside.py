# SPDX-License-Identifier: Apache-2.0
"""Files from outside that lie about their size, are cut, or are something else: an error of one line."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ssltrain.data import load
from ssltrain.data.arrays import read_idx
from ssltrain.errors import UserError
from ssltrain.runs import RunFolder

MOST_BYTES = 256 << 20


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test here may have more than 256 MB at once (NumPy and Python count their memory here)."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak >> 20} MB"


def idx(*shape: int, body: bytes = b"") -> bytes:
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body


HEADERS = {
    "2^40 images": idx(2**20, 2**10, 2**10, body=bytes(100)),
    "a product that is 100 modulo 2^64": idx(2**32 - 1, 2**32 - 1, 2**31, 4, body=bytes(100)),
    "zero of something": idx(2**32 - 1, 0, 7, body=b"1"),
    "255 dimensions": idx(*[2**32 - 1] * 255),
    "cut in its sizes": b"\0\0\x08\x03\0\0",
    "nothing": b"",
    "other bytes": os.urandom(1000),
    "floats": b"\0\0\x0d\x01" + struct.pack(">I", 4) + bytes(16),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_idx_files_that_lie(name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / ("x.gz" if zipped else "x")
    path.write_bytes(gzip.compress(HEADERS[name]) if zipped else HEADERS[name])
    with pytest.raises(UserError) as raised:
        read_idx(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_a_gzip_that_swells_is_not_read_beyond_its_header(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb") as file:
        file.write(idx(4, 5, 5, body=bytes(100)))
        for _ in range(200):
            file.write(bytes(1 << 20))
    with pytest.raises(UserError, match="holds more than its header says"):
        read_idx(path)


@pytest.mark.parametrize("shape", [(2**40, 8, 8), (2**62, 2**62), (2**31, 28, 28)])
def test_headers_of_npz_files_that_lie(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(1000))
    with pytest.raises(UserError, match="cannot read .*x.npz"):
        load(str(tmp_path / "x.npz"))


def test_arrays_of_objects_run_nothing(tmp_path: Path) -> None:
    """NumPy would unpickle them."""

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(tmp_path / "x.npz", images=np.array([Evil()], dtype=object))
    with pytest.raises(UserError, match="cannot read"):
        load(str(tmp_path / "x.npz"))
    assert not (tmp_path / "ran").exists()


def test_names_in_an_archive_are_not_paths(tmp_path: Path) -> None:
    """Arrays are looked up by name; nothing of an archive is ever extracted."""
    folder = tmp_path / "in"
    folder.mkdir()
    body = io.BytesIO()
    np.save(body, np.zeros((4, 8, 8), np.uint8))
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("../../images.npy", body.getvalue())
        archive.writestr("/etc/images.npy", body.getvalue())
    with pytest.raises(UserError, match="name them images"):
        load(str(folder / "x.npz"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.npz"]


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Path:
    """A file with the parts of a checkpoint, a megabyte long."""
    state = {name: {} for name in ("method", "optimizer", "schedule")}
    state["method"] = {"weight": torch.randn(512, 512)}
    torch.save({**state, "step": 3, "random": [1, 2]}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_damaged_checkpoints_are_errors_of_one_line(tmp_path: Path) -> None:
    """Cut anywhere, or with a byte flipped: an error, or (in a byte of a weight) what torch reads."""
    path = checkpoint(tmp_path)
    whole = path.read_bytes()
    folder = RunFolder(tmp_path)
    assert folder.read_checkpoint()["step"] == 3
    refused = 0
    places = [int(x) for x in np.linspace(0, len(whole) - 1, 20)]
    for damaged in [whole[:n] for n in places] + [
        whole[:n] + bytes([whole[n] ^ 0x41]) + whole[n + 1 :] for n in [*places, *range(0, 64, 4)]
    ]:
        path.write_bytes(damaged)
        try:
            folder.read_checkpoint()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "checkpoint" in str(error)
        assert path.read_bytes() == damaged
    assert refused >= 20


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], torch.zeros(3), {"state_dict": {"w": torch.zeros(2)}, "epoch": 3}, {"step": 1}],
    ids=["empty", "a list", "a tensor", "of another program", "a part"],
)
def test_foreign_checkpoints(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt is no checkpoint of a run"):
        RunFolder(tmp_path).read_checkpoint()


def test_checkpoints_run_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    for save in (
        lambda path: torch.save({"method": Evil()}, path),
        lambda path: path.write_bytes(pickle.dumps(Evil())),
    ):
        save(tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match="the file is damaged"):
            RunFolder(tmp_path).read_checkpoint()
        assert not (tmp_path / "ran").exists()
