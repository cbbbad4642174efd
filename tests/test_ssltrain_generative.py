# SPDX-License-Identifier: Apache-2.0
"""Methods that make images: autoencoder, VAE, GAN, at a size of milliseconds a step."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from PIL import Image
from ssltrain.cli import main, read_arguments
from ssltrain.config import GENERATIVE
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.errors import UserError
from ssltrain.methods import Batch, build_method
from ssltrain.parallel import World
from ssltrain.pictures import normal_likelihood
from ssltrain.trainer import Trainer
from ssltrain_helpers import SMALL, assert_same_bits, checkpoint, digits, rows, run, write_parts

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = {
    "autoencoder": ["--mask", "0.5"],
    "vae": ["--free-bits", "0.01"],
    "gan": ["--backbone", "ssltrain.methods.gan:critic", "--r1", "0.5"],
}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "some.npz"
    return write_parts(path, *digits(160), train=128)


@pytest.fixture(scope="module")
def data(data_file: str) -> ImageData:
    return load(data_file, DataOptions())


def trainer(method: str, data: ImageData, *words: str, **settings: Any) -> Trainer:
    config, _ = read_arguments(method, [*SMALL, *words])
    config = dataclasses.replace(config, batch_size=32, **settings).validate()
    return Trainer(config, data, World(0, 1, torch.device("cpu")), None)


@pytest.mark.parametrize("method", GENERATIVE)
def test_a_run_its_picture_and_its_figures(
    method: str, data_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs, evaluated like every other method; compared with itself; and gone on with."""
    folder = tmp_path / "a"
    assert run(method, data_file, folder, "--epochs", "2", *FLAGS[method]) == 0
    said = capsys.readouterr().out
    assert "trained encoder" in said and str(folder / "samples.png") in said
    with Image.open(folder / "samples.png") as picture:
        assert min(picture.size) > 200
    results = json.loads((folder / "results.json").read_text())
    assert set(results["accuracy"]) == {"raw", "untrained", "trained"}
    assert all(math.isfinite(row["loss"]) for row in rows(folder))
    if method == "vae":
        nats = results["nats"]
        assert set(nats) == {"elbo", "ppca", "normal"} and all(map(math.isfinite, nats.values()))
        assert "log-likelihood of a test image in nats: at least" in said
    # Stopped in the middle and gone on with: the same bits as in one go.
    other = tmp_path / "b"
    words = ["--epochs", "2", "--evaluate", "false", *FLAGS[method]]
    assert run(method, data_file, other, *words, "--stop-after", "3") == 0
    assert main([method, "--resume", str(other), "--stop-after", "0"]) == 0
    assert_same_bits(checkpoint(other), checkpoint(folder))
    assert main(["compare", str(folder), str(other), "--out", str(tmp_path / "c.png")]) == 0
    assert {"autoencoder": "Autoencoder", "vae": "VAE", "gan": "GAN"}[
        method
    ] in capsys.readouterr().out


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("micro", [0, 12])
@pytest.mark.parametrize("backend", ["fused", "eager"])
@pytest.mark.parametrize("method", GENERATIVE)
def test_steps_move_every_weight(
    method: str, backend: str, micro: int, amp: str, data: ImageData
) -> None:
    ours = trainer(method, data, *FLAGS[method], micro_batch=micro, loss_backend=backend, amp=amp)
    before = {k: v.clone() for k, v in ours.method.online.named_parameters()}
    order = torch.arange(128)
    for position in range(2):
        assert ours._step(order, position).loss.isfinite()
    for name, value in ours.method.online.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name
        assert value.requires_grad


def test_the_sides_of_a_gan_get_their_own_gradients(data: ImageData) -> None:
    """The discriminator's are those of its loss alone, though both sides go backward at once."""
    ours = trainer("gan", data, "--backbone", "ssltrain.methods.gan:critic", r1=0.0).method
    views = torch.rand(2, 32, 1, 8, 8)
    torch.manual_seed(5)
    ours.train_step(Batch(views[0], views[1]))
    found = [p.grad.clone() for p in ours._judges()]
    generator = ours.online.get_submodule("predictor")
    torch.manual_seed(5)
    with torch.no_grad():
        fake = generator(torch.randn(32, 16)).sigmoid()
    online = ours.online
    loss = ours.ops.adversarial_loss(online(fake), online(views[0]))
    for ours_, alone in zip(found, torch.autograd.grad(loss, ours._judges()), strict=True):
        torch.testing.assert_close(ours_, alone, rtol=1e-4, atol=1e-6)
    assert all(p.grad is not None for p in generator.parameters())


def test_the_penalty_is_taken_at_every_fourth_step(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times as large: on average it is the same."""
    ours = trainer("gan", data, *FLAGS["gan"])
    method, taken = ours.method, []
    penalty = method.ops.r1_penalty

    def noted(judge: Any, x: torch.Tensor, *, weight: float) -> torch.Tensor:
        taken.append((method.step, weight))
        return penalty(judge, x, weight=weight)

    monkeypatch.setattr(method.ops, "r1_penalty", noted)
    order = torch.arange(128)
    for step in range(6):
        ours._step(order, step % 4)
    assert taken == [(0, 2.0), (4, 2.0)]


def test_the_variance_of_the_pixels_moves_within_a_run(data: ImageData) -> None:
    """Adam moves what is stored by the learning rate a step, and the log-variance 20 times as far."""
    ours = trainer("vae", data, base_lr=8e-3, warmup=0.0, schedule="constant")
    spread = ours.method.get_parameter("online.spread")
    before = 20 * spread.item()
    assert before == pytest.approx(-2.0)
    ours._step(torch.arange(128), 0)
    assert abs(20 * spread.item() - before) == pytest.approx(20 * 1e-3, rel=0.01)


def test_a_mask_hides_the_same_number_of_patches_and_nothing_of_it_is_seen(
    data: ImageData,
) -> None:
    ours = trainer("autoencoder", data, mask=0.75).method
    x = torch.rand(6, 1, 8, 8)
    hidden = ours.hidden(x)
    assert (hidden.sum((1, 2, 3)) == 48).all() and len({tuple(h.flatten()) for h in hidden}) > 1
    patches = hidden.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(-1)
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(1)
    seen = [ours.masked(y)[0] for y in (x,)][0]
    torch.manual_seed(1)
    other = ours.masked(torch.where(ours.masked(x)[1] > 0, 1 - x, x))
    assert seen.shape == x.shape and other[1] is not None
    odd = ours.hidden(torch.rand(2, 1, 7, 5))
    assert odd.shape == (2, 1, 7, 5)


def test_normal_likelihood_is_that_of_its_covariance() -> None:
    """Probabilistic principal components, written as the multivariate normal that they are."""
    generator = np.random.default_rng(0)
    train = generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6)) + 3
    test = train[:50] + 0.1
    values, vectors = np.linalg.eigh(np.cov(train.T, bias=True))
    for codes in (0, 2, 5):
        noise = values[: 6 - codes].mean()
        kept = np.concatenate([np.full(6 - codes, noise), values[6 - codes :]])
        covariance = torch.from_numpy(vectors @ np.diag(kept) @ vectors.T)
        model = torch.distributions.MultivariateNormal(torch.from_numpy(train.mean(0)), covariance)
        truth = model.log_prob(torch.from_numpy(test)).mean().item()
        assert math.isclose(normal_likelihood(train, test, codes), truth, rel_tol=1e-9)


def test_what_is_refused(data: ImageData, capsys: pytest.CaptureFixture[str]) -> None:
    ours = trainer("vae", data)
    with pytest.raises(UserError, match="vae runs in one process; start it without torchrun"):
        build_method(ours.config, ours.method.encoder, World(0, 2, torch.device("cpu")), 1, (8, 8))
    with pytest.raises(UserError, match="--mask must be at least 0 and less than 1, got 1"):
        trainer("autoencoder", data, mask=1.0)
    assert main(["memory", "gan"]) == 2
    assert "whose losses see embeddings, not gan" in capsys.readouterr().err
