# SPDX-License-Identifier: Apache-2.0
"""The EMA module: buffers, schedules, state, stale addresses, wrapped networks."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref

import pytest
import torch
from helpers import engine, engines
from torch import Tensor, nn

import sslkernels
from sslkernels import EMA, cosine_decay, ema_update_


class Net(nn.Module):
    """Parameters of several shapes, tied weights, BatchNorm, an integer and an empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.tied = self.second
        self.register_buffer("table", torch.arange(6).view(2, 3))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.second(self.norm(self.first(x))))


def train_step(net: nn.Module) -> None:
    with torch.no_grad():
        net(torch.randn(16, 4))
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        for b in net.buffers():
            if b.dtype == torch.int64 and b.dim():
                b.add_(1)


@pytest.mark.parametrize("name", engines())
@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_module(buffers: str, name: str) -> None:
    online = Net()
    with engine(name):
        ema = EMA(online, 0.9, buffers=buffers)  # type: ignore[arg-type]
        truth = {k: v.double() for k, v in ema.module.state_dict().items()}
        start = copy.deepcopy(ema.module.state_dict())
        for _ in range(4):
            train_step(online)
            ema.update(online)
            for k, v in online.state_dict().items():
                if k in dict(online.named_parameters(remove_duplicate=False)):
                    truth[k] = 0.9 * truth[k] + 0.1 * v.double()
                elif buffers == "average" and v.is_floating_point():
                    truth[k] = 0.9 * truth[k] + 0.1 * v.double()
                elif buffers != "ignore":
                    truth[k] = v.double()
    for k, v in ema.module.state_dict().items():
        torch.testing.assert_close(v.double(), truth[k], rtol=1e-5, atol=1e-6, msg=k)
    assert ema.module.tied is ema.module.second
    assert ema.step == 4
    batches = int(ema.module.norm.num_batches_tracked)
    assert batches == (int(start["norm.num_batches_tracked"]) if buffers == "ignore" else 4)
    assert not any(p.requires_grad for p in ema.parameters())
    ema.eval()
    x = torch.randn(3, 4)
    assert torch.equal(ema(x), ema.module(x))


def test_parameters_are_written_in_place() -> None:
    online = Net()
    ema = EMA(online, 0.5)
    ids = [(id(p), p.data_ptr()) for p in ema.module.parameters()]
    for _ in range(3):
        ema.update(online)
    assert ids == [(id(p), p.data_ptr()) for p in ema.module.parameters()]


def test_schedule_and_step() -> None:
    online = nn.Linear(2, 2)
    seen: list[int] = []

    def decay(step: int) -> float:
        seen.append(step)
        return 1.0

    ema = EMA(online, decay)
    ema.update(online)
    ema.update(online)
    ema.update(online, step=10)
    ema.update(online)
    assert seen == [0, 1, 10, 11]
    ema.decay = lambda step: 2.0
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2.0"):
        ema.update(online)


def test_cosine_decay() -> None:
    schedule = cosine_decay(0.996, 1000)
    for k in (0, 1, 250, 999, 1000):
        want = 1 - (1 - 0.996) * (math.cos(math.pi * k / 1000) + 1) / 2
        assert schedule(k) == pytest.approx(want, rel=0, abs=1e-15)
    assert schedule(0) == 0.996 and schedule(1000) == 1.0 and schedule(5000) == 1.0
    assert cosine_decay(0.9, 10, final=0.8)(10) == pytest.approx(0.8)
    for arguments, message in [
        ((1.5, 10), "base must be in"),
        ((0.9, 0), "total_steps must be an integer of at least 1"),
        ((0.9, 10, -1.0), "final must be in"),
    ]:
        with pytest.raises(ValueError, match=f"cosine_decay: {message}"):
            cosine_decay(*arguments)


def test_state_dict_round_trip() -> None:
    online = Net()
    ema = EMA(online, 0.9, stochastic_rounding=True)
    for _ in range(3):
        train_step(online)
        ema.update(online)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = EMA(Net(), 0.9, stochastic_rounding=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.step == 3 and other.seed == ema.seed
    for net in (ema, other):
        net.update(online)
    for a, b in zip(ema.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_deepcopy_and_pickle_leave_the_plan_behind() -> None:
    online = Net()
    ema = EMA(online, cosine_decay(0.9, 10))
    ema.update(online)
    twin = copy.deepcopy(ema)
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    train_step(online)
    before = copy.deepcopy(ema.module.state_dict())
    for other in (twin, loaded):
        other.update(online)
    for k, v in ema.module.state_dict().items():
        assert torch.equal(v, before[k]), f"{k} of the original was written"
    ema.update(online)
    for other in (twin, loaded):
        for k, v in ema.module.state_dict().items():
            assert torch.equal(v, other.module.state_dict()[k])


@pytest.mark.parametrize("move", ["online", "average", "both"])
@pytest.mark.parametrize(
    "how",
    [
        "to",
        "data",
        "one",
        "shape",
        "assign",
        "parameter",
        "submodule",
        "buffer",
        "resize",
        "in place",
    ],
)
def test_moved_tensors_are_noticed(how: str, move: str) -> None:
    """Whatever happens between two updates, the result is plain arithmetic on what is there."""

    def disturb(net: nn.Module) -> None:
        linear = net[0]
        if how == "to":
            net.to(torch.float64)
        elif how == "data":
            for p in net.parameters():
                p.data = torch.randn_like(p)
        elif how == "one":
            linear.bias.data = torch.randn(6)
        elif how == "shape":  # the same address, fewer elements
            linear.bias.data = linear.bias.data[:3]
        elif how == "assign":
            net.load_state_dict(
                {
                    k: torch.randn_like(v) if v.dtype.is_floating_point else v.clone()
                    for k, v in net.state_dict().items()
                },
                assign=True,
            )
        elif how == "parameter":
            linear.weight = nn.Parameter(
                torch.randn(6, 6), requires_grad=linear.weight.requires_grad
            )
        elif how == "submodule":
            net[0] = nn.Linear(6, 6)
        elif how == "buffer":
            net[1].running_mean = torch.randn(6)
        elif how == "resize":
            with torch.no_grad():
                linear.bias.data.resize_(0)
                linear.bias.data = torch.randn(6)
        elif how == "in place":  # the same address, other strides
            with torch.no_grad():
                linear.weight.t_()

    online = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    ema = EMA(online, 0.5)
    ema.update(online)
    ema.update(online)
    nets = {"online": [online], "average": [ema.module], "both": [online, ema.module]}[move]
    for net in nets:
        disturb(net)
    want = {
        k: 0.5 * p.detach().double() + 0.5 * o.detach().double()
        for (k, p), o in zip(ema.module.named_parameters(), online.parameters(), strict=True)
        if p.shape == o.shape
    }
    if how == "shape" and move != "both":
        with pytest.raises(ValueError, match=r"0.bias.*shape"):
            ema.update(online)
        return
    for _ in range(2):
        ema.update(online)
        for k, p in ema.module.named_parameters():
            torch.testing.assert_close(p.detach().double(), want[k], rtol=1e-5, atol=1e-6, msg=k)
            o = dict(online.named_parameters())[k].detach().double()
            want[k] = 0.5 * p.detach().double() + 0.5 * o
        assert torch.equal(ema.module[1].running_mean.double(), online[1].running_mean.double())


def test_lists_are_checked_again_when_they_change() -> None:
    t, s = [torch.zeros(4), torch.zeros(3)], [torch.ones(4), torch.ones(3)]
    ema_update_(t, s, 0.5)
    ema_update_(t, s, 0.5)
    s[1] = torch.full((3,), 5.0)
    t[0].data = torch.zeros(4)
    ema_update_(t, s, 0.5)
    assert (t[0] == 0.5).all() and (t[1] == 0.375 + 2.5).all()
    s[1] = torch.ones(2)
    with pytest.raises(ValueError, match=r"targets\[1\]"):
        ema_update_(t, s, 0.5)


def test_plans_keep_nothing_alive() -> None:
    online = nn.Linear(3, 3)
    ema = EMA(online)
    ema.update(online)
    ema.update(online)
    t, s = torch.zeros(3), torch.ones(3)
    ema_update_([t], [s], 0.5)
    references = [weakref.ref(x) for x in (online, online.weight, t, s)]
    del online, t, s
    gc.collect()
    assert [r() for r in references] == [None] * 4
    assert ema._plan is None


def test_wrapped_online_networks() -> None:
    online = Net()
    ema = EMA(torch.compile(online, backend="eager"), 0.5)
    assert type(ema.module) is Net
    for wrapper in (torch.compile(online, backend="eager"), nn.DataParallel(online), online):
        old = ema.module.first.weight.clone()
        for _ in range(2):
            ema.update(wrapper)
        want = 0.25 * old + 0.75 * online.first.weight
        torch.testing.assert_close(ema.module.first.weight, want)
        train_step(online)
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    EMA(compiled).update(nn.Sequential(nn.Linear(2, 2)))


def test_dtype_of_the_average() -> None:
    online = Net().bfloat16()
    ema = EMA(online, 0.5, dtype=torch.float32)
    assert ema.module.first.weight.dtype == ema.module.norm.running_mean.dtype == torch.float32
    assert ema.module.table.dtype == torch.int64
    for _ in range(2):
        with torch.no_grad():
            online.norm.running_mean.add_(1.0)
        ema.update(online)
    assert torch.equal(ema.module.norm.running_mean, online.norm.running_mean.float())
    with pytest.raises(TypeError, match="EMA: dtype must be"):
        EMA(online, dtype=torch.int32)


def test_complex_parameters() -> None:
    online = nn.Module()
    online.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    ema = EMA(online, 0.5)
    for _ in range(2):
        old = ema.module.weight.clone()
        with torch.no_grad():
            online.weight.add_(1j)
        ema.update(online)
        torch.testing.assert_close(ema.module.weight, 0.5 * old + 0.5 * online.weight)


def test_other_networks_are_refused() -> None:
    ema = EMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="none named.*weight.*unexpected"):
        ema.update(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'weight'.*\[3, 2\].*\[2, 2\]"):
        ema.update(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="buffers must be"):
        EMA(nn.Linear(2, 2), buffers="drop")  # type: ignore[arg-type]


def test_stochastic_module_is_reproducible() -> None:
    def run() -> Tensor:
        torch.manual_seed(7)
        online = nn.Linear(40, 40).bfloat16()
        ema = EMA(online, 0.999, stochastic_rounding=True)
        with torch.no_grad():
            online.weight.add_(0.1)
        for _ in range(50):
            ema.update(online)
        return ema.module.weight.clone()

    torch.manual_seed(7)
    start = nn.Linear(40, 40).bfloat16().weight
    first = run()
    assert torch.equal(first, run())
    assert not torch.equal(first, start)


def test_update_inside_compile() -> None:
    online = nn.Linear(3, 3)
    ema = EMA(online, 0.5)
    ema.update(online)
    with torch.no_grad():
        online.weight.add_(1.0)
    want = 0.5 * ema.module.weight + 0.5 * online.weight
    torch.compile(lambda: ema.update(online), backend="aot_eager")()
    torch.testing.assert_close(ema.module.weight, want)
    assert sslkernels.EMA is EMA
