# SPDX-License-Identifier: Apache-2.0
"""cached_step: the gradient of the whole batch, from micro-batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sslkernels
from sslkernels.grad_cache import cached_step

N, D_IN, D = 11, 6, 4


class Loss(nn.Module):
    """NT-Xent with a learnt temperature, in plain PyTorch and float64."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return sslkernels.reference.nt_xent_loss(z1, z2, self.log_temperature.exp())


def network(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D_IN, 8), nn.Tanh(), *layers, nn.Linear(8, D)).double()


def two_views() -> list[Tensor]:
    return [torch.randn(N, D_IN, dtype=torch.float64) for _ in range(2)]


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters()]


def full_batch(encoder: nn.Module, loss_fn: Any, views: list[Tensor]) -> Tensor:
    loss = loss_fn(*(encoder(view) for view in views))
    loss.backward()
    return loss.detach()


def same(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("micro_batch", [1, 4, N, 100])  # 4 leaves a rest of 3
def test_the_gradient_of_the_whole_batch(micro_batch: int) -> None:
    encoder, loss_fn, views = network(), Loss(), two_views()
    truth = full_batch(encoder, loss_fn, views)
    expected = gradients(encoder, loss_fn)
    encoder.zero_grad()
    loss_fn.zero_grad()
    loss = cached_step(encoder, views, loss_fn, micro_batch)
    assert not loss.requires_grad
    same(loss, truth)
    same(gradients(encoder, loss_fn), expected)
    # Gradients accumulate, as with backward().
    cached_step(encoder, views, loss_fn, micro_batch)
    same(gradients(encoder, loss_fn), [2 * g for g in expected])


def test_micro_batches_bound_what_is_encoded_at_once() -> None:
    encoder, seen = network(), []
    encoder.register_forward_hook(
        lambda module, args, out: seen.append((len(args[0]), out.requires_grad))
    )
    cached_step(encoder, two_views(), Loss(), 4)
    sizes = [4, 4, 3] * 2
    assert seen == [(n, False) for n in sizes] + [(n, True) for n in sizes]


def test_one_encoder_a_view() -> None:
    towers, loss_fn, views = [network(), network()], Loss(), two_views()
    loss_fn(towers[0](views[0]), towers[1](views[1])).backward()
    expected = gradients(*towers)
    for argument in (towers, nn.ModuleList(towers)):
        for tower in towers:
            tower.zero_grad()
        cached_step(argument, views, loss_fn, 3)
        same(gradients(*towers), expected)


def test_dropout_is_the_same_in_both_passes() -> None:
    """Against a full-batch graph with the dropout masks that the micro-batches draw."""
    encoder, loss_fn, views = network(nn.Dropout(0.5)), Loss(), two_views()
    state = torch.get_rng_state()
    outputs = [torch.cat([encoder(part) for part in view.split(4)]) for view in views]
    after = torch.get_rng_state()
    truth = loss_fn(*outputs)
    truth.backward()
    expected = gradients(encoder, loss_fn)
    encoder.zero_grad()
    loss_fn.zero_grad()
    torch.set_rng_state(state)
    same(cached_step(encoder, views, loss_fn, 4), truth.detach())
    same(gradients(encoder, loss_fn), expected)
    assert torch.equal(torch.get_rng_state(), after), "as after one forward pass"


def test_random_numbers_of_the_loss_are_not_drawn_again() -> None:
    def noisy(z1: Tensor, z2: Tensor) -> Tensor:
        return (z1 * torch.rand_like(z1)).sum() + z2.sum()

    encoder, views = network(nn.Dropout(0.5)), two_views()
    state = torch.get_rng_state()
    with torch.no_grad():
        noisy(*(torch.cat([encoder(part) for part in view.split(4)]) for view in views))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    cached_step(encoder, views, noisy, 4)
    assert torch.equal(torch.get_rng_state(), after)


class Replacing(nn.Module):
    """A buffer that is assigned, not changed in place."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return x


def test_buffers_move_once_a_micro_batch() -> None:
    encoder, views = network(nn.BatchNorm1d(8), Replacing()), two_views()
    twin = network(nn.BatchNorm1d(8), Replacing())
    twin.load_state_dict(encoder.state_dict())
    loss_fn = Loss()
    outputs = [torch.cat([twin(part) for part in view.split(4)]) for view in views]
    loss_fn(*outputs).backward()
    cached_step(encoder, views, loss_fn, 4)
    assert int(encoder[2].num_batches_tracked) == 6
    same(dict(encoder.named_buffers()), dict(twin.named_buffers()))
    same(gradients(encoder), gradients(twin))


def test_a_failing_encoder_leaves_buffers_alone() -> None:
    encoder = network(nn.BatchNorm1d(8))
    before = {name: b.clone() for name, b in encoder.named_buffers()}
    views = [torch.randn(8, D_IN, dtype=torch.float64) for _ in range(2)]
    views[1] = views[1][:, :3]
    with pytest.raises(RuntimeError):
        cached_step(encoder, views, Loss(), 4)
    same(dict(encoder.named_buffers()), before)


def test_a_frozen_encoder_and_an_unused_view() -> None:
    online, target, views = network(), network().requires_grad_(False), two_views()
    cached_step([online, target], views, lambda z1, z2: (z1 * z2).sum(), 4)
    expected = gradients(online)
    online.zero_grad()
    (online(views[0]) * target(views[1])).sum().backward()
    same(expected, gradients(online))
    online.zero_grad()
    cached_step(online, views, lambda z1, z2: z1.square().sum(), 4)
    ours = gradients(online)
    online.zero_grad()
    online(views[0]).square().sum().backward()
    same(ours, gradients(online))


def test_gradients_of_the_views() -> None:
    encoder, loss_fn, views = network(), Loss(), two_views()
    views = [view.requires_grad_() for view in views]
    full_batch(encoder, loss_fn, views)
    expected = [view.grad.clone() for view in views]
    for view in views:
        view.grad = None
    cached_step(encoder, views, loss_fn, 4)
    same([view.grad for view in views], expected)


def test_autocast_does_not_lose_the_gradient() -> None:
    encoder, views = network().float(), [view.float() for view in two_views()]
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(encoder, views, lambda a, b: sslkernels.nt_xent_loss(a, b), 4)
        ours = gradients(encoder)
        encoder.zero_grad()
        full_batch(encoder, lambda a, b: sslkernels.nt_xent_loss(a, b), views)
    # bfloat16 gradients of weights are rounded once a micro-batch instead of once.
    for x, y in zip(ours, gradients(encoder), strict=True):
        assert (x - y).norm() < 2e-2 * y.norm() and y.norm() > 0


def test_ddp_synchronises_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, loss_fn, views = network(), Loss(), two_views()
        full_batch(module, loss_fn, views)
        expected = gradients(module)
        module.zero_grad()
        ddp = nn.parallel.DistributedDataParallel(module)
        reductions = []

        def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations
            reductions.append(bucket.index())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        ddp.register_comm_hook(None, count)
        cached_step(ddp, views, loss_fn, 4)
        assert reductions == [0]
        same(gradients(module), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"micro_batch": 0}, ValueError, "micro_batch must be an integer of at least 1, got 0"),
        ({"micro_batch": -3}, ValueError, "micro_batch must be an integer of at least 1, got -3"),
        ({"micro_batch": 2.0}, TypeError, "micro_batch must be an integer of at least 1, got 2.0"),
        (
            {"views": torch.ones(2, D_IN)},
            TypeError,
            "views must be a sequence of views, got one Tensor",
        ),
        ({"views": [1]}, TypeError, r"views\[0\] must be a tensor, or a mapping.*got int"),
        ({"views": []}, ValueError, "views must have at least one tensor"),
        ({"views": [torch.ones(0, D_IN)]}, ValueError, r"at least one row, got shape \[0, 6\]"),
        (
            {"views": [torch.ones(3, D_IN, requires_grad=True) * 2]},
            ValueError,
            r"views\[0\] must be a leaf or detached",
        ),
        ({"encoder": [nn.Identity()]}, ValueError, "one for each view, got 1 for 2 views"),
        ({"encoder": lambda x: x[:1]}, ValueError, r"each of the 4 samples, got shape \[1, 6\]"),
        ({"encoder": lambda x: (x, x)}, TypeError, "encoder must return a tensor, got tuple"),
        ({"loss_fn": lambda a, b: 1.0}, TypeError, "loss_fn must return a tensor, got float"),
        ({"loss_fn": lambda a, b: a.sum(1)}, ValueError, r"a 0-d loss .*got shape \[11\]"),
        ({"loss_fn": lambda a, b: a.sum().detach()}, ValueError, "requires_grad=False"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "encoder": network(),
        "views": two_views(),
        "loss_fn": Loss(),
        "micro_batch": 4,
    }
    with pytest.raises(error, match=f"cached_step: .*{message}"):
        cached_step(**(arguments | change))
