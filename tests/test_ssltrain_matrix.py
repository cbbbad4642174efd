# SPDX-License-Identifier: Apache-2.0
"""Every method with every flag that changes its step, three steps each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain.cli import read_arguments
from ssltrain.config import METHODS
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.errors import UserError
from ssltrain.parallel import World
from ssltrain.trainer import Trainer
from ssltrain_helpers import SMALL, digits, write_parts

FLAGS: dict[str, list[str]] = {
    "amp": ["none", "bf16"],
    "micro-batch": ["0", "24"],
    "symmetric": ["false", "true"],
    "optimizer": ["sgd", "adamw", "lars"],
}
CASES = list(itertools.product(METHODS, *FLAGS.values()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    path = tmp_path_factory.mktemp("data") / "a.npz"
    return load(write_parts(path, *digits(208), train=192), DataOptions())


def trainer(method: str, data: ImageData, *words: str) -> Trainer:
    config, _ = read_arguments(method, [*SMALL, *words])
    return Trainer(config, data, World(0, 1, torch.device("cpu")), None)


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_three_steps(case: tuple[str, ...], data: ImageData) -> None:
    method, *values = case
    if "lars" in values:
        pytest.importorskip("pytorch_optimizer", reason="LARS comes from there")
    words = [w for name, value in zip(FLAGS, values, strict=True) for w in (f"--{name}", value)]
    ours = trainer(method, data, *words, "--epochs", "1", "--base-lr", "0.1")
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
    if method == "moco":
        keys = ours.method.queue.keys
        assert keys.dtype == torch.float32 and keys.shape == (128, 16)
        norms = keys.norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro", ["0", "24"])
def test_autocast_changes_the_loss_by_the_precision_of_bfloat16(
    method: str, micro: str, data: ImageData
) -> None:
    losses = []
    for amp in ("none", "bf16"):
        ours = trainer(method, data, "--amp", amp, "--micro-batch", micro, "--epochs", "1")
        torch.manual_seed(0)
        views = torch.rand(3, 64, 1, 8, 8)
        ours.method.prime([views[2]])
        losses.append(ours.method.train_step(views[0], views[1]).loss.item())
    assert losses[0] != losses[1]
    assert math.isclose(*losses, rel_tol=0.05)


@pytest.mark.parametrize("micro", ["1", "21", "63"])
def test_a_micro_batch_of_one_image_is_refused(micro: str, data: ImageData) -> None:
    with pytest.raises(UserError, match=f"--micro-batch {micro} leaves a part of one image"):
        trainer("simclr", data, "--micro-batch", micro)
