# SPDX-License-Identifier: Apache-2.0
"""Trainers on several ranks: batch norm over all, shuffled keys, torchrun, ranks that die, other numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from distributed_cases import process_group
from helpers import HANGS_S, leave_group, threads
from ssltrain.cli import main
from ssltrain.config import TrainConfig
from ssltrain.errors import UserError
from ssltrain.methods import Batch, build_method, named_for
from ssltrain.methods.simclr import classes
from ssltrain.models import build_encoder
from ssltrain.norms import CPUSyncBatchNorm, synchronised
from ssltrain.parallel import World, _others_are_gone
from ssltrain_helpers import SMALL, checkpoint, digits, rows, write_parts

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
ROOT = Path(__file__).resolve().parents[1]
WORLD, ROWS = 2, (5, 7)
METHODS = ("simclr", "byol", "moco", "supcon")


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 9, 6),
            nn.BatchNorm1d(6, affine=False, momentum=None),
        )
        nn.init.normal_(layers[1].weight)
        return layers.double()


def images() -> tuple[Tensor, Tensor]:
    """Inputs, and gradients of the outputs."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(sum(ROWS), 1, 5, 5, generator=generator, dtype=torch.float64),
        torch.randn(sum(ROWS), 6, generator=generator, dtype=torch.float64),
    )


def results(layers: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Any]:
    """Output, gradients, running statistics, and the output in evaluation."""
    x = x.clone().requires_grad_()
    y = layers(x)
    gradients = torch.autograd.grad(y, [x, *layers.parameters()], dy)
    return {
        "y": y.detach(),
        "dx": gradients[0],
        "parameters": list(gradients[1:]),
        "buffers": {name: b.clone() for name, b in layers.named_buffers()},
        "eval": layers.eval()(x).detach(),
    }


def config_of(method: str, **more: Any) -> TrainConfig:
    return TrainConfig(
        method=method,
        batch_size=12,
        width=8,
        stages=2,
        blocks=1,
        projector_hidden=8,
        projector_dim=4,
        queue_size=16,
        **more,
    )


def views() -> Batch:
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.rand(12, 1, 8, 8, generator=generator) for _ in range(2))
    return Batch(one, two, (), torch.randint(-1, 3, (12,), generator=generator))


def first_step(method: str, world: World, micro_batch: int, crops: int = 0) -> dict[str, Any]:
    """Loss and gradients of the first step, and the names of the state."""
    config = config_of(method, micro_batch=micro_batch, crops=crops)
    torch.manual_seed(4)
    encoder = build_encoder(config, torch.tensor([0.5]), torch.tensor([0.3]), (8, 8))
    found = build_method(config, encoder, world, 10)
    found.train()
    share = slice(world.rank * 12 // world.size, (world.rank + 1) * 12 // world.size)
    whole = views()
    assert whole.labels is not None
    small = tuple(whole.view_1[share].flip(3) for _ in range(crops))
    batch = Batch(whole.view_1[share], whole.view_2[share], small, whole.labels[share])
    if method == "moco":
        found.queue.enqueue(torch.ones(4, 4).cumsum(0) if world.rank == 0 else torch.ones(0, 4))
    report = found.train_step(batch)
    return {
        "loss": world.mean(report.loss.detach()),
        "gradients": [p.grad for p in found.online.parameters()],
        "state": list(found.state_dict()),
        "queue": found.queue.digest() if method == "moco" else "",
    }


def worker(rank: int, folder: str) -> None:
    with process_group(folder, rank, WORLD):
        world = World(rank, WORLD, torch.device("cpu"))
        x, dy = (t.split(ROWS)[rank] for t in images())
        out: dict[str, Any] = {"norms": results(synchronised(network()), x, dy)}
        seen: list[Tensor] = []

        def encode(part: Tensor) -> Tensor:
            seen.append(part)
            return 10 * part

        own = torch.arange(6.0).view(6, 1) + 6 * rank
        for seed in (0, 0, 1):
            assert torch.equal(world.shuffled(own, encode, seed), 10 * own)
        out["shuffled"] = seen
        for method in METHODS:
            for micro_batch in (0, 3) if method == "simclr" else (0,):
                out[f"{method} {micro_batch}"] = first_step(method, world, micro_batch)
        out["simclr crops"] = first_step("simclr", world, 0, crops=1)
        torch.save(out, f"{folder}/{rank}.pt")
        dist.barrier()
        leave_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


def test_batch_norm_over_all_processes(ranks: list[dict[str, Any]]) -> None:
    """Of unequal shares: outputs, gradients and running statistics are those of the joined batch."""
    truth = results(network(), *images())
    norms = [rank["norms"] for rank in ranks]
    for name in ("y", "dx", "eval"):
        torch.testing.assert_close(torch.cat([n[name] for n in norms]), truth[name])
    summed = [sum(parts) for parts in zip(*(n["parameters"] for n in norms), strict=True)]
    torch.testing.assert_close(summed, truth["parameters"])
    for n in norms:
        torch.testing.assert_close(n["buffers"], truth["buffers"])


def test_a_synchronised_network_is_the_same_one() -> None:
    layers = network()
    before = {**dict(layers.named_parameters()), **dict(layers.named_buffers())}
    after = synchronised(layers)
    assert isinstance(after[1], CPUSyncBatchNorm) and after is layers  # type: ignore[index]
    now = {**dict(after.named_parameters()), **dict(after.named_buffers())}
    assert now.keys() == before.keys() and all(now[name] is before[name] for name in now)
    assert isinstance(synchronised(nn.BatchNorm1d(3)), CPUSyncBatchNorm)
    truth = results(network(), *images())
    torch.testing.assert_close(results(after, *images()), truth)  # one process


def test_shuffled_keys(ranks: list[dict[str, Any]]) -> None:
    """Each process encodes rows of both, all rows are encoded once, in an order of the seed."""
    for call in range(3):
        parts = [rank["shuffled"][call].flatten().tolist() for rank in ranks]
        assert sorted(parts[0] + parts[1]) == list(range(12))
        assert all(min(part) < 6 <= max(part) for part in parts)
    first, again, other = ranks[0]["shuffled"]
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("case", ["simclr 0", "simclr crops", "byol 0", "supcon 0"])
def test_a_step_is_that_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """With batch norm over all: loss and gradients of the joined batch."""
    method, what = case.split()
    alone = first_step(method, World(0, 1, torch.device("cpu")), 0, crops=int(what == "crops"))
    for rank in ranks:
        found = rank[case]
        torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["gradients"], alone["gradients"], rtol=1e-3, atol=1e-5)


def test_micro_batches_communicate_in_step(ranks: list[dict[str, Any]]) -> None:
    """Batch norm does in every forward pass, the parameters' gradients once: the same on both."""
    one, other = (rank["simclr 3"] for rank in ranks)
    assert torch.equal(one["loss"], other["loss"]) and one["loss"].isfinite()
    torch.testing.assert_close(one["gradients"], other["gradients"])


def test_a_state_fits_any_number_of_processes(ranks: list[dict[str, Any]]) -> None:
    for method in ("byol", "moco"):
        alone = first_step(method, World(0, 1, torch.device("cpu")), 0)["state"]
        several = ranks[0][f"{method} 0"]["state"]
        assert several != alone
        assert list(named_for(1, dict.fromkeys(several))) == alone
        assert list(named_for(2, dict.fromkeys(alone))) == several
        assert list(named_for(2, dict.fromkeys(several))) == several


def test_moco_has_one_queue(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["moco 0"]["queue"] == ranks[1]["moco 0"]["queue"]
    torch.testing.assert_close(ranks[0]["moco 0"]["gradients"], ranks[1]["moco 0"]["gradients"])


def test_images_without_labels_are_their_own_class_on_every_rank() -> None:
    batch = Batch(torch.zeros(3), torch.zeros(3), (), torch.tensor([-1, 2, -1]))
    assert classes(batch).tolist() == [-1, 2, -3]
    assert classes(batch, 3).tolist() == [-4, 2, -6]


def test_which_batch_norm() -> None:
    assert config_of("moco").norms == "shuffle" and config_of("byol").norms == "sync"
    assert config_of("moco", batch_norm="sync").norms == "sync"
    with pytest.raises(UserError, match="--batch-norm must be auto, sync or local, got shuffle"):
        config_of("simclr", batch_norm="shuffle").validate()


def test_which_errors_are_those_of_communication() -> None:
    said = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    assert _others_are_gone(RuntimeError(said))
    assert not _others_are_gone(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# ------------------------------------------------------------------------------------------ torchrun


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes; torchrun chooses the port."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        # Behind -- all words are the script's: torchrun has flags that begin with --run.
        [*command, "--nproc-per-node", "2", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_process_dies_and_the_run_goes_on(
    victim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in epoch 2 of 3; the first time resumed alone for a step, then by two processes again."""
    data = write_parts(tmp_path / "a.npz", *digits(168), train=128)
    folder = tmp_path / "run"
    words = [*SMALL, "--data", data, "--run", str(folder), "--epochs", "3", "--save-every", "1",
             "--evaluate", "false", "--threads", "1"]  # fmt: skip
    script = str(ROOT / "tests" / "ssltrain_rank_dies.py")
    died = torchrun(tmp_path, "--", script, victim, "3", "simclr", *words)
    assert died.returncode != 0
    assert "ssltrain: error: another process of the run has ended" in died.stderr, died.stderr
    assert "Traceback" not in died.stderr.split("ssltrain: error")[0], died.stderr
    assert checkpoint(folder)["step"] == 2  # of the end of epoch 1, and readable
    assert not list(folder.glob("*.partial"))
    if victim == "1":
        return
    capsys.readouterr()
    with threads(1):
        assert main(["simclr", "--resume", str(folder), "--stop-after", "1"]) == 0
    assert "made by 2 processes and goes on with 1" in capsys.readouterr().err
    assert checkpoint(folder)["step"] == 3
    done = torchrun(tmp_path, "-m", "--", "ssltrain", "simclr", "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("made by 1 processes and goes on with 2") == 1
    state = checkpoint(folder)
    assert state["step"] == 6 and len(state["random"]) == 2
    assert [row["step"] for row in rows(folder)] == [2, 4, 6]
