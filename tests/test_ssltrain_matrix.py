# SPDX-License-Identifier: Apache-2.0
"""Every method with every flag that changes its step, three steps each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain import parallel
from ssltrain.cli import main, read_arguments
from ssltrain.config import GENERATIVE, METHODS, TrainConfig
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.errors import UserError
from ssltrain.methods import Batch
from ssltrain.parallel import World
from ssltrain.trainer import Trainer
from ssltrain_helpers import SMALL, digits, tokens, write_parts

pytestmark = pytest.mark.usefixtures("one_thread")

# Those that make images have tests of their own: test_ssltrain_generative.py.
EMBEDDING = [method for method in METHODS if method not in GENERATIVE]
FLAGS: dict[str, list[Any]] = {
    "amp": ["none", "bf16", "fp16"],
    "micro_batch": [0, 12],
    "symmetric": [False, True],
    "optimizer": ["sgd", "adamw", "lars"],
}
# One half holds every pair of flags; the other one is a campaign.
CASES = [
    pytest.param(
        method,
        {flag: values[place] for (flag, values), place in zip(FLAGS.items(), places, strict=True)},
        marks=[pytest.mark.campaign] * (sum(places) % 2),
    )
    for method, *places in itertools.product(EMBEDDING, *(range(len(v)) for v in FLAGS.values()))
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    path = tmp_path_factory.mktemp("data") / "a.npz"
    return load(write_parts(path, *digits(108), train=96), DataOptions())


@functools.cache  # parsing takes as long as the three steps
def small(method: str) -> TrainConfig:
    config, _ = read_arguments(method, SMALL)
    return dataclasses.replace(config, batch_size=32, epochs=1, queue_size=64)


def trainer(method: str, data: ImageData, **settings: Any) -> Trainer:
    config = dataclasses.replace(small(method), **settings).validate()
    return Trainer(config, data, World(0, 1, torch.device("cpu")), None)


def name_of(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("method", "flags"), CASES, ids=name_of)
def test_three_steps(method: str, flags: dict[str, Any], data: ImageData) -> None:
    if flags["optimizer"] == "lars":
        pytest.importorskip("pytorch_optimizer", reason="LARS comes from there")
    ours = trainer(method, data, base_lr=0.1, **flags)
    network = ours.method.network
    before: dict[str, Any] = {k: v.clone() for k, v in network.state_dict().items()}
    ours.fit()
    assert ours.method.step == 3
    after = network.state_dict()
    for name, value in after.items():
        assert value.isfinite().all(), name
        assert value.dtype == before[name].dtype, name
    weights = [name for name, _ in network.named_parameters()]
    assert all(not torch.equal(after[name], before[name]) for name in weights)
    if flags["amp"] == "fp16":
        assert ours.method.scaler.get_scale() > 1
    if method == "moco":
        keys = ours.method.queue.keys
        assert keys.dtype == torch.float32 and keys.shape == (64, 16)
        norms = keys.norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-2)


@pytest.mark.parametrize("method", EMBEDDING)
@pytest.mark.parametrize("micro", [0, 12])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_changes_the_loss_by_its_precision(
    method: str, micro: int, dtype: str, data: ImageData
) -> None:
    losses = []
    for amp in ("none", dtype):
        ours = trainer(method, data, amp=amp, micro_batch=micro)
        torch.manual_seed(0)
        views = torch.rand(3, 32, 1, 8, 8)
        ours.method.prime([views[2]])
        batch = Batch(views[0], views[1], labels=torch.arange(32) % 10, tokens=tokens(32))
        losses.append(ours.method.train_step(batch).loss.item())
    assert losses[0] != losses[1]
    assert math.isclose(*losses, rel_tol=0.05 if dtype == "bf16" else 0.01, abs_tol=0.01)


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_bf16_where_the_processor_computes_it(
    able: bool, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "computes_bf16", lambda device: able)
    wanted = "bf16" if able else "none"
    assert trainer("simclr", data, amp="auto").config.amp == wanted
    words = [
        "simclr",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--stop-after",
        "1",
        "--progress",
        "false",
    ]
    assert main([*words, "--amp", "auto", "--run", str(tmp_path / "run")]) == 0
    assert TrainConfig.load(tmp_path / "run" / "config.yaml").amp == wanted


def test_auto_is_bf16_if_every_process_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = parallel.World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(parallel.World, "gather", lambda self, value: [True, False])
    assert parallel.choose_amp("auto", world) == "none"
    assert parallel.choose_amp("fp16", world) == "fp16"


@pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_compute_bf16_from_ampere_on(
    capability: tuple[int, int], able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert parallel.computes_bf16(torch.device("cuda")) is able


def test_slow_bf16_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parallel, "computes_bf16", lambda device: False)
    words = ["simclr", "--data", "digits", "--dry-run", "--amp", "bf16", "--run", str(tmp_path)]
    assert main(words) == 0
    assert "--amp none is faster" in capsys.readouterr().err


@pytest.mark.parametrize("micro", [1, 31])
def test_a_micro_batch_of_one_image_is_refused(micro: int, data: ImageData) -> None:
    with pytest.raises(UserError, match=f"--micro-batch {micro} leaves a part of one image"):
        trainer("simclr", data, micro_batch=micro)
