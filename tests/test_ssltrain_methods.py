# SPDX-License-Identifier: Apache-2.0
"""The methods against their papers, plain PyTorch against the fused losses, options, recipes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain import eager
from ssltrain.augment import TwoViews
from ssltrain.cli import main, read_arguments
from ssltrain.config import GENERATIVE, METHODS, TrainConfig
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.errors import UserError
from ssltrain.methods import Batch
from ssltrain.methods.simclr import classes
from ssltrain.models import EveryOther, SmallResNet
from ssltrain.parallel import World
from ssltrain.presets import recipe, recipe_names
from ssltrain.trainer import Trainer
from ssltrain_helpers import (
    SMALL,
    assert_same_bits,
    checkpoint,
    digits,
    rows,
    run,
    tokens,
    write_parts,
)

import sslkernels

pytestmark = pytest.mark.usefixtures("one_thread")
# Those that make images have tests of their own: test_ssltrain_generative.py.
EMBEDDING = [method for method in METHODS if method not in GENERATIVE]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_parts(tmp_path_factory.mktemp("data") / "a.npz", *digits(168), train=128)


@pytest.fixture(scope="module")
def data(data_file: str) -> ImageData:
    return load(data_file, DataOptions())


@functools.cache
def small(method: str) -> TrainConfig:
    return read_arguments(method, [*SMALL, "--epochs", "5"])[0]


def trainer(method: str, data: ImageData, **settings: Any) -> Trainer:
    config = dataclasses.replace(small(method), **settings).validate()
    return Trainer(config, data, World(0, 1, torch.device("cpu")), None)


def batch(**more: Any) -> Batch:
    torch.manual_seed(0)
    labels = torch.arange(64) % 10
    more.setdefault("tokens", tokens(64))
    return Batch(torch.rand(64, 1, 8, 8), torch.rand(64, 1, 8, 8), labels=labels, **more)


def flat_backbone(in_channels: int) -> nn.Module:
    """A backbone without batch norm, whose gradient is a sum over images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 12), nn.Tanh())


FLAT = f"{__name__}:flat_backbone"


# ---- plain PyTorch -------------------------------------------------------------------------------


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", ["nt_xent", "many views", "in batch", "queue", "few"])
def test_plain_losses_and_metrics_are_those_of_the_fused_ones(case: str) -> None:
    torch.manual_seed(1)
    a, b, c = (torch.randn(3 if case == "few" else 24, 8, requires_grad=True) for _ in range(3))
    queue = torch.randn(50, 8)
    with torch.no_grad():  # positives that are sometimes found
        b.copy_(a + 0.8 * b)
    calls = {
        "nt_xent": lambda ops: ops.nt_xent_loss(a, b, 0.2, return_metrics=True),
        "many views": lambda ops: ops.nt_xent_loss([a, b, c], None, 0.2, return_metrics=True),
        "in batch": lambda ops: ops.info_nce_loss(a, b, None, 0.2, return_metrics=True),
        "queue": lambda ops: ops.info_nce_loss(a, b, queue, 0.2, return_metrics=True),
        "few": lambda ops: ops.nt_xent_loss(a, b, 0.2, return_metrics=True),
    }
    found = []
    for ops in (sslkernels, eager):
        loss, metrics = calls[case](ops)
        grads = torch.autograd.grad(loss, [a, b])
        assert all(not metric.requires_grad for metric in metrics)
        found.append([loss.detach(), *metrics, *grads])
    assert 0 < found[0][1] <= 1
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("method", EMBEDDING)
def test_a_run_in_plain_pytorch_is_the_same_run(
    method: str, data_file: str, tmp_path: Path
) -> None:
    words = ["--epochs", "2", "--evaluate", "false", "--loss-backend"]
    for backend in ("fused", "eager"):
        assert run(method, data_file, tmp_path / backend, *words, backend) == 0
    ours, theirs = (rows(tmp_path / backend) for backend in ("fused", "eager"))
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "positive_similarity", "negative_similarity"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), name
        for name in (
            "top1",
            "top5",
        ):  # counts: rounding may move some of the few hundred rows by a place
            assert a[name] == pytest.approx(b[name], abs=0.02), name
    fused, plain = (checkpoint(tmp_path / backend)["method"] for backend in ("fused", "eager"))
    assert fused.keys() == plain.keys()


def test_the_plain_queue_wraps_and_keeps_the_newest() -> None:
    torch.manual_seed(0)
    for size, counts in ((5, (3, 4, 2)), (4, (9, 1)), (3, (3, 3, 1))):
        queues = [ops.KeyQueue(size, 2) for ops in (sslkernels, eager)]
        for count in counts:
            keys = torch.randn(count, 2)
            for queue in queues:
                queue.enqueue(keys)
            close(queues[1].keys, queues[0].keys)
            assert len(queues[0]) == len(queues[1])
    assert_same_bits(sorted(queues[0].state_dict()), sorted(queues[1].state_dict()))


# ---- the papers ----------------------------------------------------------------------------------


def test_simsiam_is_its_pseudocode(data: ImageData) -> None:
    ours = trainer("simsiam", data)
    online, one = ours.method.online, batch()
    p, z = online(torch.cat([one.view_1, one.view_2]))
    assert not z.requires_grad

    def d(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return -(F.normalize(p, dim=1) * F.normalize(z.detach(), dim=1)).sum(dim=1).mean()

    (p1, p2), (z1, z2) = p.chunk(2), z.chunk(2)
    expected = d(p1, z2) / 2 + d(p2, z1) / 2
    expected.backward()
    grads = [parameter.grad.clone() for parameter in online.parameters()]
    online.zero_grad()
    metrics = ours.method.train_step(one)
    close(metrics.loss, expected.detach())
    for parameter, grad in zip(online.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-6)
    # Projector of three layers with batch norm at the end, predictor of a quarter of the width.
    projector, predictor = ours.method.network.projector, online.predictor
    assert [type(m).__name__ for m in projector if not isinstance(m, nn.ReLU)] == [
        "Linear",
        "BatchNorm1d",
        "Linear",
        "BatchNorm1d",
        "Linear",
        "BatchNorm1d",
    ]
    assert not projector[-1].affine and predictor[0].out_features == 4
    groups = ours.optimizer.param_groups
    constant = {p for group in groups if group["constant"] for p in group["params"]}
    assert constant == set(predictor.parameters())


def test_moco3_is_its_pseudocode(data: ImageData) -> None:
    ours = trainer("moco3", data, temperature=0.3, ema_decay=0.75)
    method, one = ours.method, batch()
    with torch.no_grad():
        for parameter in method.online.parameters():
            parameter.mul_(1.1)
        before = [p.clone() for p in method.target.parameters()]
    method.train_step(one)
    grads = [parameter.grad.clone() for parameter in method.online.parameters()]
    pairs = zip(method.target.parameters(), before, method.network.parameters(), strict=True)
    for target, old, new in pairs:  # the keys are of the network after its average has moved
        close(target, 0.75 * old + 0.25 * new)
    method.online.zero_grad()

    def ctr(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
        return 2 * 0.3 * F.cross_entropy(logits / 0.3, torch.arange(64))

    with torch.no_grad():
        k1, k2 = (method.target(view) for view in (one.view_1, one.view_2))
    q1, q2 = method.online(torch.cat([one.view_1, one.view_2])).chunk(2)
    (ctr(q1, k2) + ctr(q2, k1)).backward()
    for parameter, grad in zip(method.online.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-3, atol=1e-5)


def test_supcon_takes_images_of_a_class_together(data: ImageData) -> None:
    one = batch()
    assert one.labels is not None
    mixed = one._replace(labels=torch.where(torch.arange(64) < 30, -1, one.labels))
    own = classes(mixed)
    assert len(own[:30].unique()) == 30 and own[:30].max() < 0
    assert torch.equal(own[30:], one.labels[30:])
    # Without any label every image is its own class, which is SimCLR.
    alone = one._replace(labels=torch.full((64,), -1))
    losses = []
    for name, views in (("simclr", one), ("supcon", alone), ("supcon", one)):
        losses.append(trainer(name, data, temperature=0.2).method.train_step(views).loss)
    close(losses[1], losses[0])
    assert losses[2] > losses[0] + 0.1


def test_supcon_needs_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=digits(100)[0])
    assert main(["supcon", "--data", str(tmp_path / "a.npz"), *SMALL]) == 2
    assert "supcon trains on labels, and a has no labels" in capsys.readouterr().err


def test_the_head_of_moco_v1_and_a_16_bit_queue(data: ImageData) -> None:
    ours = trainer("moco", data, projector_layers=1, queue_dtype="bf16")
    assert [type(m).__name__ for m in ours.method.network.projector] == ["Linear"]
    ours.method.prime([batch().view_1])
    assert ours.method.queue.keys.dtype == torch.bfloat16
    assert ours.method.train_step(batch()).loss.isfinite()


@pytest.mark.parametrize("method", EMBEDDING)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_of_the_projector(method: str, layers: int, data: ImageData) -> None:
    projector = trainer(method, data, projector_layers=layers).method.network.projector
    assert sum(isinstance(module, nn.Linear) for module in projector) == layers


def test_features_are_means_over_the_parts_of_the_last_map() -> None:
    net = SmallResNet(1, 4, 2, 1, stem_stride=2, pool=2).eval()
    images = torch.rand(3, 1, 16, 16)
    maps = net.layers(net.stem(images))
    assert maps.shape == (3, 8, 4, 4), "halved by the stem, and again by the second stage"
    parts = [maps[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)]
    torch.testing.assert_close(net(images), torch.stack(parts, 2).flatten(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_shortcut_is_a_strided_convolution_and_survives() -> None:
    """torch 2.13 dies in the backward pass of the strided one: 8 channels, 64 x 64, channels last."""
    ours = EveryOther(8, 16, 2)
    images = torch.randn(4, 8, 7, 64)
    theirs = torch.nn.functional.conv2d(images, ours.weight, stride=2)
    torch.testing.assert_close(ours(images), theirs)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            images = torch.randn(16, 8, 64, 64).contiguous(memory_format=torch.channels_last)
            ours.to(memory_format=torch.channels_last)(images).sum().backward()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("method", EMBEDDING)
def test_micro_batches_give_the_gradient_of_the_batch(
    method: str, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = []
    for micro in (0, 24):
        ours = trainer(method, data, backbone=FLAT, micro_batch=micro).method.double()
        ours.eval()  # batch norm by running statistics: images do not see each other in it
        torch.manual_seed(1)
        views = torch.rand(4, 64, 1, 8, 8, dtype=torch.float64)
        ours.prime([views[2]])
        crops = (views[3],) if method in ("simclr", "byol", "supcon") else ()
        metrics = ours.train_step(
            Batch(views[0], views[1], crops, torch.arange(64) % 10, tokens(64))
        )
        grads.append([p.grad for p in ours.online.parameters()] + [metrics.loss])
    assert any(grad.abs().max() > 1e-3 for grad in grads[0][:-1])
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


# ---- multi-crop ----------------------------------------------------------------------------------


def test_small_views_have_their_size_and_share_of_the_image() -> None:
    config = TrainConfig(crops=3, crop_min=0.05, crop_max=0.2, jitter=0.0, gray=0.0, flip=0.0)
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(4, 1, 32, 32)
    torch.manual_seed(0)
    views = TwoViews(config, 1, (32, 32)).small_views(ramp)
    assert len(views) == 3 and all(view.shape == (4, 1, 16, 16) for view in views)
    # The ramp falls from 0 to 248/255 over the width: a cut shows the part of it that it covers.
    spans = torch.stack([view.amax((1, 2, 3)) - view.amin((1, 2, 3)) for view in views])
    assert (spans > 0.1).all() and (spans < 0.65).all()
    assert not torch.equal(views[0], views[1])
    sized = dataclasses.replace(config, crop_size=12)
    assert TwoViews(sized, 1, (32, 32)).small_views(ramp)[0].shape == (4, 1, 12, 12)
    assert TwoViews(TrainConfig(), 1, (32, 32)).small_views(ramp) == ()


@pytest.mark.parametrize("micro", [0, 24])
@pytest.mark.parametrize("method", ["simclr", "byol", "supcon"])
def test_multi_crop_trains(method: str, micro: int, data: ImageData) -> None:
    ours = trainer(method, data, crops=2, epochs=1, micro_batch=micro)
    ours.fit()
    assert ours.method.step == 2
    assert all(p.isfinite().all() for p in ours.method.online.parameters())


def test_small_crops_predict_both_views_in_byol(data: ImageData) -> None:
    method, one = trainer("byol", data).method, batch()
    method.eval()
    crops = (one.view_1.flip(3), one.view_2.flip(2))
    views = {name: getattr(one, name) for name in ("view_1", "view_2")}
    with torch.no_grad():
        p1, p2, pa, pb = (method.online(x) for x in (*views.values(), *crops))
        t1, t2 = (method.target(x) for x in views.values())

    def d(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 2 - 2 * F.cosine_similarity(p, t).mean()

    pairs = [(p1, t2), (p2, t1), *itertools.product((pa, pb), (t1, t2))]
    expected = sum(d(p, t) for p, t in pairs) / 6
    close(method.train_step(one._replace(crops=crops)).loss, expected)


@pytest.mark.parametrize("method", ["moco", "moco3", "simsiam"])
def test_multi_crop_is_refused_where_it_has_no_meaning(method: str) -> None:
    with pytest.raises(UserError, match=f"--crops must be 0, as {method} has two views"):
        TrainConfig(method=method, crops=2).validate()  # type: ignore[arg-type]


# ---- precision and clipping ----------------------------------------------------------------------


def test_gradients_are_clipped(data: ImageData) -> None:
    moved = []
    for clip in (0.0, 1e-3):
        ours = trainer(
            "simclr",
            data,
            optimizer="sgd",
            momentum=0.0,
            weight_decay=0.0,
            base_lr=4.0,
            clip_grad=clip,
            warmup=0.0,
        )
        before = [p.detach().clone() for p in ours.method.online.parameters()]
        ours._step(torch.arange(128), 0)
        after = [p.detach() for p in ours.method.online.parameters()]
        steps = [(a - b).square().sum() for a, b in zip(after, before, strict=True)]
        moved.append(torch.stack(steps).sum().sqrt().item())
    # A rate of 4 at 256 images is 1 at 64.
    assert moved[1] == pytest.approx(1e-3, rel=1e-3) and moved[0] > 0.05


def test_float16_scales_the_loss_and_resumes_bit_for_bit(data_file: str, tmp_path: Path) -> None:
    words = ["--epochs", "3", "--evaluate", "false", "--amp", "fp16", "--clip-grad", "1"]
    assert run("simclr", data_file, tmp_path / "whole", *words) == 0
    assert run("simclr", data_file, tmp_path / "parts", *words, "--stop-after", "3") == 0
    assert main(["simclr", "--resume", str(tmp_path / "parts")]) == 0
    whole = checkpoint(tmp_path / "whole")
    assert_same_bits(checkpoint(tmp_path / "parts"), whole)
    assert whole["scaler"]["scale"] > 1
    assert rows(tmp_path / "whole")[-1]["loss"] < rows(tmp_path / "whole")[0]["loss"]


# ---- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_whole_configuration(name: str, tmp_path: Path) -> None:
    settings = recipe(name)
    config = TrainConfig(**settings).validate()
    assert config.method == name.split("-")[0]
    given = {"batch_size", "epochs", "optimizer", "base_lr", "weight_decay", "warmup", "crop_min"}
    assert given <= set(settings)
    if config.backbone == "resnet":
        read, _ = read_arguments(config.method, ["--recipe", name])
        assert {key: getattr(read, key) for key in settings} == settings


def test_every_method_has_a_recipe() -> None:
    assert set(METHODS) <= set(recipe_names())


def test_flags_beat_a_recipe_beats_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = read_arguments("moco", ["--recipe", "moco-cifar10", "--epochs", "3"])
    assert (config.epochs, config.queue_size, config.recipe) == (3, 4096, "moco-cifar10")
    assert config.translate > 0, "what the recipe does not set stays as the preset has it"
    assert main(["simclr", "--recipe", "moco"]) == 2
    assert "use 'ssltrain moco'" in capsys.readouterr().err
    assert main(["simclr", "--recipe", "resnet"]) == 2
    assert "--recipe must be one of autoencoder, byol, byol-fashion" in capsys.readouterr().err


def test_recipes_can_be_listed_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == recipe_names()
    assert main(["recipes", "moco-cifar10"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    config, _ = read_arguments("moco", ["--config", str(tmp_path / "mine.yaml")])
    assert config.epochs == recipe("moco-cifar10")["epochs"]
