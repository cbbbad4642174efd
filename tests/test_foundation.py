# SPDX-License-Identifier: Apache-2.0
"""Promises about all ops at once: opcheck of each, and a training step compiled for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flat import LAYOUTS, own_arguments
from helpers import HANGS_S
from torch import nn

import sslkernels
from sslkernels import reference

HERE = Path(__file__).resolve().parent
OPS = sorted(
    name.split("::")[1].split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("sslkernels::")
)


def test_every_op_is_opchecked() -> None:
    """By name, in a test file that calls opcheck; the checks themselves are in those files."""
    checked = "\n".join(
        text for path in HERE.glob("test_*.py") if "opcheck(" in (text := path.read_text("utf-8"))
    )
    assert len(OPS) >= 15, OPS
    assert [name for name in OPS if not re.search(rf"ops\.(sslkernels\.)?{name}\b", checked)] == []


@pytest.mark.parametrize("backend", ["chunked", None])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, False, True), (True, False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_contrastive_backward(backend: str | None, layout: str, wanted) -> None:
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    bank = torch.randn(7, 8) if layout == "bank" else None
    own = own_arguments(layout, 5)
    bias = own["bias"].detach() if "bias" in own else None
    ids = (own.get("ids_q"), None)
    head = (layout, a, b, bank, torch.tensor(5.0), *ids, True, "mean", False, bias)
    head = (*head, own.get("sigma", 0.0))
    if layout == "classes":  # there is no b
        wanted = (wanted[0], False, wanted[2])
    with sslkernels.backend(backend):
        _, *state, _ = torch.ops.sslkernels.contrastive.default(*head, False)
        torch.library.opcheck(
            torch.ops.sslkernels.contrastive_backward.default,
            (layout, a, b, None, *head[4:], *state, torch.ones(()), *wanted),
        )


@pytest.mark.parametrize("backend", ["chunked", None])
@pytest.mark.parametrize(("reduction", "cosine"), [("none", False), ("mean", True)])
def test_opcheck_regression_backward(backend: str | None, reduction: str, cosine: bool) -> None:
    p, t = torch.randn(5, 8), torch.randn(5, 8)
    with sslkernels.backend(backend):
        loss, state = torch.ops.sslkernels.regression.default(p, t, reduction, cosine)
        torch.library.opcheck(
            torch.ops.sslkernels.regression_backward.default,
            (p, t, reduction, cosine, state, torch.ones_like(loss)),
        )


@pytest.mark.slow
def test_a_compiled_model_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and its loss in one graph of the default compiler, with three steps of SGD."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    class Model(nn.Module):
        def __init__(self, module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))
            self.module = module

        def forward(self, x: torch.Tensor, y: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            q, k = self.net(x), self.net(y)
            own = keys.expand(len(q), *keys.shape)
            return (
                self.module.nt_xent_loss(q, k, 0.2)
                + self.module.info_nce_loss(q, k, keys, 0.2)
                + self.module.info_nce_loss(q, k, own, 0.2, negative_mode="paired")
                + self.module.byol_loss(q, k.detach())
            )

    x, y, keys = torch.randn(40, 12), torch.randn(40, 12), torch.randn(9, 8)
    torch.compiler.reset()
    results = []
    for module, wrap in ((sslkernels, torch.compile), (reference, lambda m, fullgraph: m)):
        model = Model(module)
        step = wrap(model, fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = step(x, y, keys)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append(torch.stack([*losses, *(p.detach().sum() for p in model.parameters())]))
    assert results[0][2] < results[0][0]
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


AHEAD_OF_TIME = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
if sys.argv[2] == "with": import sslkernels
model = torch._inductor.aoti_load_package(sys.argv[1])
print(model(*torch.arange(64.0).sin().view(2, 8, 4)).item())
"""


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
def test_ahead_of_time_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with a loss in it runs where sslkernels is imported, and elsewhere names the op.

    Half a minute of a C++ compiler, without optimisation.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.arange(64.0).sin().view(2, 8, 4)
    options = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
    }
    with torch.no_grad():
        program = torch.export.export(sslkernels.NTXentLoss(0.5), tuple(x))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "loss.pt2"), inductor_configs=options
        )
    done = [
        subprocess.run(
            [sys.executable, "-c", AHEAD_OF_TIME, package, word],
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            capture_output=True,
            text=True,
            timeout=HANGS_S,
        )
        for word in ("with", "without")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert abs(float(done[0].stdout) - float(sslkernels.nt_xent_loss(*x, 0.5))) < 1e-6
    assert "Could not find schema for sslkernels::contrastive" in done[1].stderr
