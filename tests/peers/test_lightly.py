# SPDX-License-Identifier: Apache-2.0
"""lightly's classes and ours side by side."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import check_budget
from side_by_side import check_same, check_same_error, check_signature, check_state, leaves, peer
from torch import Tensor, nn

import sslkernels
from sslkernels.integrations import lightly as ours

theirs_loss = peer("lightly.loss")
theirs_dcl = peer("lightly.loss.dcl_loss")
theirs_bank = peer("lightly.models.modules.memory_bank")
theirs_modules = peer("lightly.models.modules")
theirs_utils = peer("lightly.models.utils")

THEIRS: dict[str, Any] = {
    "NTXentLoss": theirs_loss.NTXentLoss,
    "DCLLoss": theirs_loss.DCLLoss,
    "DCLWLoss": theirs_loss.DCLWLoss,
    "NegativeCosineSimilarity": theirs_loss.NegativeCosineSimilarity,
    "MemoryBankModule": theirs_bank.MemoryBankModule,
    "NNMemoryBankModule": theirs_modules.NNMemoryBankModule,
    "negative_mises_fisher_weights": theirs_dcl.negative_mises_fisher_weights,
    "update_momentum": theirs_utils.update_momentum,
}
# lightly makes a tensor of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
SIZES = [(1, 8), (2, 1), (7, 16), (64, 32)]


@pytest.mark.parametrize("name", THEIRS)
def test_signatures(name: str) -> None:
    check_signature(getattr(ours, name), THEIRS[name])


@pytest.mark.parametrize("temperature", [0.5, 0.07, 1, 10.0, -0.5])
@pytest.mark.parametrize("size", SIZES)
def test_nt_xent(size: tuple[int, int], temperature: float) -> None:
    for gather in (False, True):
        check_same(
            ours.NTXentLoss(temperature, gather_distributed=gather),
            theirs_loss.NTXentLoss(temperature, gather_distributed=gather),
            leaves(size, size),
        )


def test_nt_xent_with_learnt_temperature() -> None:
    z = leaves((9, 8), (9, 8))

    def loss(cls: Any, dtype: torch.dtype, temperature: Tensor) -> Tensor:
        module = cls(0.5)
        module.temperature = temperature
        return module(*(x.to(dtype) for x in z))

    check_same(
        lambda t: loss(ours.NTXentLoss, t.dtype, t),
        lambda t: loss(theirs_loss.NTXentLoss, t.dtype, t),
        [torch.tensor(0.3)],
    )
    parameter = nn.Parameter(torch.tensor(0.3))
    check_state(ours.NTXentLoss(parameter), theirs_loss.NTXentLoss(parameter))


def _bank_pair(cls: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs, made from the same seed."""
    made = []
    for source in (getattr(ours, cls), THEIRS[cls]):
        torch.manual_seed(3)
        made.append(source(*args, **kwargs))
    return made[0], made[1]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_with_a_bank(temperature: float) -> None:
    """The bank before the batch, then the batch in it: loss, gradients and bank over three laps."""
    mine, other = _bank_pair(
        "NTXentLoss", temperature, memory_bank_size=(12, 8), gather_distributed=True
    )
    truth = copy.deepcopy(other).double()
    assert torch.equal(mine.memory_bank.bank, other.memory_bank.bank)
    for _ in range(9):
        z = leaves((4, 8), (4, 8))
        results = []
        for loss, wide in ((mine, False), (other, False), (truth, True)):
            a, b = ((x.double() if wide else x.clone()).requires_grad_() for x in z)
            value = loss(a, b)
            results.append((value, *torch.autograd.grad(value, (a, b))))
        for name, m, t, d in zip(("loss", "out0", "out1"), *results, strict=True):
            check_budget(m, t, d, name=name)
        torch.testing.assert_close(mine.memory_bank.bank, other.memory_bank.bank)
        assert torch.equal(mine.memory_bank.bank_ptr, other.memory_bank.bank_ptr)
    with torch.no_grad():  # nothing enters without a gradient
        before = mine.memory_bank.bank.clone()
        torch.testing.assert_close(mine(*z), other(*z))
    assert torch.equal(mine.memory_bank.bank, before)
    mine(z[0], z[1].requires_grad_())  # nor when the first view has none
    assert torch.equal(mine.memory_bank.bank, before)


def test_states() -> None:
    check_state(*_bank_pair("NTXentLoss", memory_bank_size=(12, 8)))
    check_state(*_bank_pair("NNMemoryBankModule", (12, 8)))
    mine, other = _bank_pair("MemoryBankModule", (12, 8))
    check_state(mine, other)
    assert dict(mine.named_buffers()).keys() == dict(other.named_buffers()).keys()


@pytest.mark.parametrize("first", [True, False])
def test_memory_bank(first: bool) -> None:
    mine, other = _bank_pair("MemoryBankModule", size=(6, 4), feature_dim_first=first)
    for step in range(5):
        x = torch.randn(3, 4)
        update = step != 2
        (out, bank), (out_, bank_) = mine(x, None, update), other(x, None, update)
        assert out is out_ is x and torch.equal(bank, bank_) and bank.shape == bank_.shape
        assert torch.equal(mine.bank, other.bank) and torch.equal(mine.bank_ptr, other.bank_ptr)
        bank.zero_()  # a copy
        assert torch.equal(mine.bank, other.bank)
    for empty in (0, (0,), (0, 4)):
        assert ours.MemoryBankModule(empty)(x, update=True) == (x, None)


def test_a_wrapping_batch_keeps_its_tail() -> None:
    """Better than lightly, which drops the rows that do not fit and goes back to the first row."""
    mine, other = _bank_pair("MemoryBankModule", (5, 2), feature_dim_first=False)
    x0, x1 = torch.randn(3, 2), torch.randn(4, 2)
    for bank in (mine, other):
        bank(x0, update=True)
        bank(x1, update=True)
    expected = torch.cat((x1[2:], x0[2:], x1[:2]))
    assert torch.equal(mine.bank, expected) and int(mine.bank_ptr) == 2
    assert torch.equal(other.bank, torch.cat((x0, x1[:2]))) and int(other.bank_ptr) == 0
    long = torch.arange(14.0).view(7, 2)  # longer than the bank: the newest rows stay
    mine(long, update=True)
    other(long, update=True)
    assert {tuple(row) for row in mine.bank.tolist()} == {tuple(r) for r in long[2:].tolist()}
    assert torch.equal(other.bank, long[:5])


def test_nearest_neighbours() -> None:
    mine, other = _bank_pair("NNMemoryBankModule", (40, 8))
    for step in range(4):
        x = 3 * torch.randn(10, 8)
        update = step != 1
        assert torch.equal(mine(x, update=update), other(x, update=update))
        assert torch.equal(mine.bank, other.bank)
    check_same_error(
        lambda: ours.NNMemoryBankModule(0)(x), lambda: theirs_modules.NNMemoryBankModule(0)(x)
    )


@pytest.mark.parametrize("temperature", [0.1, 0.5, -1.0])
@pytest.mark.parametrize("size", [(2, 1), (7, 16), (64, 32)])
def test_dcl(size: tuple[int, int], temperature: float) -> None:
    for weight_fn, weight_fn_ in (
        (None, None),
        (ours.negative_mises_fisher_weights, theirs_dcl.negative_mises_fisher_weights),
        (lambda a, b: (a - b).square().sum(1),) * 2,
        (partial(theirs_dcl.negative_mises_fisher_weights, sigma=0.3),) * 2,
    ):
        check_same(
            ours.DCLLoss(temperature, weight_fn, gather_distributed=True),
            theirs_loss.DCLLoss(temperature, weight_fn_, gather_distributed=True),
            leaves(size, size),
            slack=4e-6,
        )
    for sigma in (0.5, 1e-3, 100.0):
        check_same(
            ours.DCLWLoss(temperature, sigma),
            theirs_loss.DCLWLoss(temperature, sigma),
            leaves(size, size),
        )


def test_mises_fisher_weights() -> None:
    z = leaves((9, 4), (9, 4))
    for sigma in (1e-7, 0.5, 1e4):
        torch.testing.assert_close(
            ours.negative_mises_fisher_weights(*z, sigma),
            theirs_dcl.negative_mises_fisher_weights(*z, sigma).detach(),
        )


@pytest.mark.parametrize(
    ("shapes", "dim"),
    [
        (((9, 8), (9, 8)), 1),
        (((9, 8), (9, 8)), 0),
        (((9, 8), (9, 8)), -1),
        (((3, 5, 8), (3, 5, 8)), 1),
        (((1, 8), (9, 8)), 1),
        (((7,), (7,)), 0),
    ],
)
def test_negative_cosine(shapes: Any, dim: int) -> None:
    inputs = leaves(*shapes)
    for eps in (1e-8, 0.0, 1e-2):
        check_same(
            ours.NegativeCosineSimilarity(dim, eps),
            theirs_loss.NegativeCosineSimilarity(dim, eps),
            inputs,
        )
    mine, other = ours.NegativeCosineSimilarity(dim), theirs_loss.NegativeCosineSimilarity(dim)
    check_same(lambda x: mine(x, inputs[1].to(x)), lambda x: other(x, inputs[1].to(x)), inputs[:1])
    check_same(lambda x: mine(inputs[1].to(x), x), lambda x: other(inputs[1].to(x), x), inputs[:1])


def test_negative_cosine_of_a_zero_row() -> None:
    x = torch.randn(4, 8)
    x[1] = 0
    check_same(
        ours.NegativeCosineSimilarity(),
        theirs_loss.NegativeCosineSimilarity(),
        [torch.randn(4, 8), torch.randn(4, 8)],
    )
    y = torch.randn(4, 8)
    torch.testing.assert_close(
        ours.NegativeCosineSimilarity()(x, y), theirs_loss.NegativeCosineSimilarity()(x, y)
    )


def test_momentum() -> None:
    online = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))
    averages = [copy.deepcopy(online) for _ in range(2)]
    for m in (0.99, 0.0, 1.0, 0.5):
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(torch.randn_like(parameter))
        online(torch.randn(6, 5))
        ours.update_momentum(online, averages[0], m)
        theirs_utils.update_momentum(online, averages[1], m)
        for mine, other in zip(*(a.state_dict().values() for a in averages), strict=True):
            torch.testing.assert_close(mine, other)  # buffers stand still in both


def test_errors() -> None:
    x, y = torch.randn(4, 8), torch.randn(4, 6)
    for arguments in (
        {"temperature": 0.0},
        {"temperature": 1e-9},
        {"memory_bank_size": -1},
        {"memory_bank_size": (10, -1)},
        {"memory_bank_size": (1, 2, 3)},
        {"memory_bank_size": 64},
    ):
        check_same_error(
            lambda a=arguments: ours.NTXentLoss(**a),
            lambda a=arguments: theirs_loss.NTXentLoss(**a),
        )
    for a, b in ((x, y), (x, x[:3]), (x[0], x[0]), (x, x.long())):
        for cls in ("NTXentLoss", "DCLLoss"):
            check_same_error(
                lambda a=a, b=b, c=cls: getattr(ours, c)()(a, b),
                lambda a=a, b=b, c=cls: THEIRS[c]()(a, b),
            )
    check_same_error(
        lambda: ours.NTXentLoss(memory_bank_size=(9, 6))(x, x),
        lambda: theirs_loss.NTXentLoss(memory_bank_size=(9, 6))(x, x),
    )
    check_same_error(
        lambda: ours.MemoryBankModule((9, 6))(x, update=True),
        lambda: theirs_bank.MemoryBankModule((9, 6))(x, update=True),
    )
    check_same_error(
        lambda: ours.NegativeCosineSimilarity()(x, y),
        lambda: theirs_loss.NegativeCosineSimilarity()(x, y),
    )
    check_same_error(
        lambda: ours.update_momentum(nn.Linear(2, 2), nn.Linear(3, 2), 0.9),
        lambda: theirs_utils.update_momentum(nn.Linear(2, 2), nn.Linear(3, 2), 0.9),
    )


def test_one_sample_has_no_negatives() -> None:
    """lightly's DCL is then -inf; ours is the positive alone."""
    x = torch.randn(1, 4)
    assert theirs_loss.DCLLoss(0.5)(x, x) == -torch.inf
    torch.testing.assert_close(ours.DCLLoss(0.5)(x, x), torch.tensor(-2.0))


def test_half_precision_is_accumulated_in_float32() -> None:
    """lightly sums in the dtype of the input; ours is nearer to the truth."""
    z = [torch.randn(64, 32) for _ in range(2)]
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [x.to(dtype) for x in z]
        truth = theirs_loss.NTXentLoss(0.07)(*(x.double() for x in narrow))
        loss = ours.NTXentLoss(0.07)(*narrow)
        other = theirs_loss.NTXentLoss(0.07)(*narrow)
        assert loss.dtype == other.dtype == dtype
        assert abs(loss - truth) <= abs(other - truth)
        assert loss == truth.to(dtype)  # rounded once
        with torch.autocast("cpu", dtype):
            loss, other = ours.NTXentLoss(0.07)(*z), theirs_loss.NTXentLoss(0.07)(*z)
            assert loss.dtype == other.dtype == torch.float32


def test_patch_reaches_the_installed_package() -> None:
    import lightly.loss.regularizer.co2 as co2

    class Before(theirs_loss.NTXentLoss):
        pass

    with sslkernels.patch("lightly"):
        import lightly.loss
        import lightly.models.modules.memory_bank

        assert lightly.loss.NTXentLoss is ours.NTXentLoss
        assert lightly.models.modules.memory_bank.MemoryBankModule is ours.MemoryBankModule
        assert co2.MemoryBankModule is ours.MemoryBankModule
        x = torch.randn(4, 8)
        assert not isinstance(Before(), ours.NTXentLoss)
        assert type(lightly.loss.NTXentLoss()).__name__ == "NTXentLoss"
        assert co2.CO2Regularizer(memory_bank_size=(6, 8))(x, x).isfinite()
    assert lightly.loss.NTXentLoss is THEIRS["NTXentLoss"]
    assert co2.MemoryBankModule is THEIRS["MemoryBankModule"]
