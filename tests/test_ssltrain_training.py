# SPDX-License-Identifier: Apache-2.0
"""Training end to end on a few hundred digits: losses fall, resuming is exact, outputs exist."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import HANGS_S
from torch import nn

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain.augment import TwoViews
from ssltrain.cli import main, read_arguments
from ssltrain.config import METHODS, TrainConfig
from ssltrain.data import load
from ssltrain.diagnostics import collapse
from ssltrain.evaluate import SOURCES, few_label_rows, table
from ssltrain.methods import Batch, build_method
from ssltrain.optim import build_optimizer, build_schedule
from ssltrain.parallel import World
from ssltrain.runs import METRICS, epoch_order
from ssltrain.trainer import fresh_encoder
from ssltrain_helpers import (
    SMALL,
    TIMES,
    assert_same_bits,
    checkpoint,
    digits,
    rows,
    run,
    write_parts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PYTHON_FOLDER = Path(__file__).resolve().parents[1] / "python"
ROOT = PYTHON_FOLDER.parent


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """320 of the digits as .npz, in parts of 256 and 64."""
    return write_parts(tmp_path_factory.mktemp("data") / "some.npz", *digits(320), train=256)


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_lower_the_loss(method: str, digits_file: str, tmp_path: Path) -> None:
    folder = tmp_path / method
    assert run(method, digits_file, folder, "--epochs", "5", "--evaluate", "false") == 0
    written = rows(folder)
    assert [row["epoch"] for row in written] == [0, 1, 2, 3, 4]
    assert written[-1]["step"] == 20
    assert tuple(written[0]) == METRICS
    assert all(math.isfinite(value) for row in written for value in row.values())
    assert written[-1]["loss"] < 0.96 * written[0]["loss"]
    # These do not train to tell images of a batch apart.
    if method not in ("byol", "autoencoder", "vae", "gan"):
        assert written[-1]["top1"] > written[0]["top1"]
    assert 1 <= written[-1]["effective_rank"] <= 16  # two stages of width 8 give 16 features
    assert any((folder / "tensorboard").iterdir())
    assert checkpoint(folder)["step"] == 20


@pytest.mark.slow
def test_the_preset_learns_digits(tmp_path: Path) -> None:
    """A quarter of the epochs is well above the untrained encoder, and above pixels where labels are few."""
    folder = tmp_path / "run"
    assert main(["simclr", "--epochs", "15", "--run", str(folder)]) == 0
    accuracy = json.loads((folder / "results.json").read_text())["accuracy"]
    raw, untrained, trained = (accuracy[source] for source in ("raw", "untrained", "trained"))
    assert trained["knn"] > max(0.965, untrained["knn"] + 0.03)
    assert trained["linear"] > max(0.98, untrained["linear"])
    assert trained["linear_few"] > raw["linear_few"] + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_resuming_continues_bit_for_bit(method: str, digits_file: str, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    words = ["--epochs", "3", "--evaluate", "false", "--erase", "0.5"]
    assert run(method, digits_file, whole, *words) == 0
    # Six steps: one epoch and a half, so that the position within an epoch matters.
    assert run(method, digits_file, halves, *words, "--stop-after", "6") == 0
    assert checkpoint(halves)["step"] == 6
    torch.manual_seed(99)  # what the process drew before must not matter
    assert main([method, "--resume", str(halves)]) == 0
    assert_same_bits(checkpoint(halves), checkpoint(whole))
    for ours, theirs in zip(rows(halves), rows(whole), strict=True):
        for name in set(METRICS) - set(TIMES):
            assert ours[name] == theirs[name], name


def test_another_seed_gives_another_run(digits_file: str, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        run(
            "simclr",
            digits_file,
            tmp_path / seed,
            "--seed",
            seed,
            "--epochs",
            "1",
            "--evaluate",
            "false",
        )
    assert rows(tmp_path / "0")[0]["loss"] != rows(tmp_path / "1")[0]["loss"]


def test_an_interrupt_leaves_a_checkpoint(
    digits_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []
    forward = TwoViews.forward

    def interrupted(self: TwoViews, images: torch.Tensor) -> Any:
        calls.append(len(images))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(self, images)

    monkeypatch.setattr(TwoViews, "forward", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    folder = tmp_path / "run"
    assert run("simclr", digits_file, folder, "--epochs", "2", "--evaluate", "false") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint(folder)["step"] == 3
    assert f"ssltrain simclr --resume {folder}" in capsys.readouterr().out
    assert main(["simclr", "--resume", str(folder)]) == 0
    assert checkpoint(folder)["step"] == 8


def test_resume_refuses_what_would_change_the_run(
    digits_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run("moco", digits_file, folder, "--epochs", "2", "--evaluate", "false", "--stop-after", "5")
    capsys.readouterr()
    assert main(["moco", "--resume", str(folder), "--base-lr", "0.5"]) == 2
    assert "--base-lr was 0.02" in capsys.readouterr().err
    assert main(["byol", "--resume", str(folder)]) == 2
    assert "is a moco run" in capsys.readouterr().err
    (folder / "checkpoint.pt").write_bytes(b"cut short")
    assert main(["moco", "--resume", str(folder)]) == 2
    assert "the file is damaged" in capsys.readouterr().err
    (folder / "checkpoint.pt").unlink()
    assert main(["moco", "--resume", str(folder)]) == 2
    assert "has no checkpoint.pt" in capsys.readouterr().err


def test_autocast_trains(digits_file: str, tmp_path: Path) -> None:
    words = ["--epochs", "3", "--evaluate", "false", "--amp", "bf16"]
    assert run("simclr", digits_file, tmp_path / "run", *words) == 0
    written = rows(tmp_path / "run")
    assert written[-1]["loss"] < written[0]["loss"]
    weights = checkpoint(tmp_path / "run")["method"]
    assert all(
        value.dtype != torch.bfloat16 for value in weights.values() if torch.is_tensor(value)
    )


def flat_backbone(in_channels: int) -> nn.Module:
    """A backbone without batch norm, whose gradient is a sum over images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 12), nn.Tanh())


@pytest.mark.parametrize(
    ("method_name", "symmetric"), [("simclr", "false"), ("moco", "false"), ("moco", "true")]
)
def test_micro_batches_give_the_gradient_of_the_batch(
    digits_file: str, method_name: str, symmetric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flat_backbone", sys.modules[__name__])
    grads = []
    for micro in ("0", "24"):
        method = small_method(
            method_name,
            digits_file,
            "--backbone",
            "flat_backbone:flat_backbone",
            "--micro-batch",
            micro,
            "--symmetric",
            symmetric,
        ).double()
        method.eval()  # batch norm by running statistics: images do not see each other in it
        torch.manual_seed(1)
        views = torch.rand(3, 64, 1, 8, 8, dtype=torch.float64)
        method.prime([views[2]])
        metrics = method.train_step(Batch(views[0], views[1]))
        grads.append([p.grad for p in method.online.parameters()] + [metrics.loss])
    assert any(grad.abs().max() > 1e-3 for grad in grads[0][:-1])
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def small_method(name: str, data_file: str, *words: str) -> Any:
    """A method before its first step of ten, on views of the size of the digits."""
    config, _ = read_arguments(name, ["--data", data_file, *SMALL, *words])
    encoder = fresh_encoder(config, load(config.data))
    return build_method(config, encoder, World(0, 1, torch.device("cpu")), 10)


def test_byol_moves_its_target_after_the_step(digits_file: str) -> None:
    method = small_method("byol", digits_file, "--ema-decay", "0.75")
    optimizer = build_optimizer(method.config, method.online)
    views = torch.rand(2, 64, 1, 8, 8)
    for step in range(2):
        before = [p.detach().double() for p in method.target.parameters()]
        method.train_step(Batch(views[0], views[1]))
        unmoved = [p.detach().double() for p in method.target.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, unmoved, strict=True))
        optimizer.step()
        method.after_step()
        decay = 1 - 0.25 * (math.cos(math.pi * step / 10) + 1) / 2  # the paper's schedule
        online = [p.detach().double() for p in method.network.parameters()]
        for target, old, new in zip(method.target.parameters(), before, online, strict=True):
            expected = decay * old + (1 - decay) * new
            torch.testing.assert_close(target.double(), expected, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in method.target.parameters())


def test_moco_averages_first_and_enqueues_last(digits_file: str) -> None:
    method = small_method("moco", digits_file, "--ema-decay", "0.75", "--symmetric", "false")
    method.eval()  # running statistics: a key then depends on its own image alone
    views = torch.rand(2, 64, 1, 8, 8)
    method.prime([torch.rand(64, 1, 8, 8)])
    with torch.no_grad():
        for parameter in method.online.parameters():
            parameter.mul_(1.25)
        before = [p.clone() for p in method.target.parameters()]
    seen = len(method.queue)
    method.train_step(Batch(views[0], views[1]))
    online = list(method.network.parameters())
    for target, old, new in zip(method.target.parameters(), before, online, strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)
    assert (seen, len(method.queue)) == (64, 128)
    with torch.no_grad():  # the new rows are keys of view 2 under the averaged network
        keys = nn.functional.normalize(method.target(views[1]), dim=1)
    torch.testing.assert_close(method.queue.keys[64:], keys, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in method.target.parameters())


# ---- evaluation and plots ------------------------------------------------------------------------


def test_evaluation_embedding_and_plots(
    digits_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("simclr", digits_file, folder, "--epochs", "2") == 0
    results = json.loads((folder / "results.json").read_text())
    assert table(results) in capsys.readouterr().out
    assert set(results["accuracy"]) == {"raw", "untrained", "trained"}
    for scores in results["accuracy"].values():
        assert set(scores) == {"knn", "linear", "linear_few", "linear_few_std"}
        assert all(0.3 < scores[name] <= 1 for name in ("knn", "linear", "linear_few"))
    for name in ("loss.png", "embeddings.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        (folder / name).unlink()

    (folder / "results.json").unlink()
    assert main(["eval", str(folder)]) == 0
    assert json.loads((folder / "results.json").read_text()) == results

    (folder / "loss.png").unlink()
    assert main(["plot", str(folder), "--device", "cpu"]) == 0
    assert (folder / "loss.png").exists() and (folder / "embeddings.png").exists()

    assert main(["embed", str(folder)]) == 0
    with np.load(folder / "embeddings.npz") as arrays:
        assert arrays["train_features"].shape == (256, 16)
        assert arrays["test_features"].shape == (64, 16)
        assert np.array_equal(arrays["test_labels"], load(digits_file).test.labels)
        own = arrays["test_features"]
    assert main(["embed", str(folder), "--data", "digits", "--out", str(tmp_path / "all.bin")]) == 0
    with np.load(tmp_path / "all.bin") as arrays:
        assert arrays["train_features"].shape == (1437, 16)
    assert np.isfinite(own).all() and own.std() > 0


def test_images_without_labels_train_and_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (110, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    folder = tmp_path / "run"
    assert run("byol", str(tmp_path / "a.npz"), folder, "--epochs", "1") == 0
    assert "has no labels" in capsys.readouterr().out
    assert (folder / "embeddings.png").exists() and not (folder / "results.json").exists()
    assert main(["eval", str(folder)]) == 2
    assert "has no labels" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nothing", "one class", "some"])
def test_labels_of_some_or_one_class(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Probes use the images that have labels, and are skipped where these are of one class."""
    monkeypatch.setattr("ssltrain.plots.flat_map", lambda features: features[:, :2])
    images, labels = digits(120)
    labels = {
        "nothing": np.full(120, -1),
        "one class": np.full(120, 5),
        "some": np.where(np.arange(120) % 3 == 0, -1, labels % 2),
    }[kind]
    data = write_parts(tmp_path / "a.npz", images, labels, train=80)
    folder = tmp_path / "run"
    assert run("simclr", data, folder, "--epochs", "1") == 0
    said = capsys.readouterr()
    why = {"nothing": "has no labels", "one class": "has one class only"}.get(kind)
    assert (folder / "embeddings.png").exists()
    if why is None:
        results = json.loads((folder / "results.json").read_text())
        assert results["train_images"] == 53 and results["test_images"] == 27
    else:
        assert f"note: a {why}: the run is not evaluated by probes" in said.err
        assert f"a {why}: no probes, only the plots" in said.out
        assert not (folder / "results.json").exists()
        assert main(["eval", str(folder)]) == 2
        assert f"a {why}; the evaluation needs two classes" in capsys.readouterr().err


def test_images_without_a_label_are_drawn_as_such() -> None:
    from ssltrain import plots

    labels = np.array([-1, 1, 0, -1, 1])
    places = dict.fromkeys(SOURCES, np.arange(10.0).reshape(5, 2))
    figure = plots.map_figure("SimCLR", places, labels, ["0", "20251231"])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["unlabelled", "0", "20251231"]
    counts = [len(dots.get_offsets()) for dots in figure.axes[0].collections]
    assert counts == [2, 1, 2]


def test_any_name_of_a_class_can_be_drawn(tmp_path: Path) -> None:
    from ssltrain import plots

    names = ["$x_2", "_private", "\udcff", "a" * 40]
    places = dict.fromkeys(SOURCES, np.arange(8.0).reshape(4, 2))
    figure = plots.map_figure("SimCLR", places, np.arange(4), names)
    figure.savefig(tmp_path / "map.png")
    assert len(figure.legends[0].get_texts()) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_few_test_images_are_enough(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the map nor the probes need more images than there are."""
    images, labels = digits(64 + count)
    data = write_parts(tmp_path / "a.npz", images, labels, train=64)
    assert run("simclr", data, tmp_path / "run", "--epochs", "1") == 0
    assert (tmp_path / "run" / "embeddings.png").exists()


def test_the_demo_compares_the_three_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssltrain.plots.flat_map", lambda features: features[:, :2])  # t-SNE: slow
    monkeypatch.setattr("ssltrain.evaluate.PROBE_ITERATIONS", 20)
    assert main(["demo", *SMALL, "--epochs", "1", "--batch-size", "256"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    titles = [line.split("  ")[0] for line in last]
    assert titles == ["raw pixels", "untrained encoder", "SimCLR", "BYOL", "MoCo"]
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == [f"{name}-digits-seed0" for name in ("byol", "moco", "simclr")]
    results = json.loads((tmp_path / "runs" / "moco-digits-seed0" / "results.json").read_text())
    assert last[-1].split()[1] == f"{results['accuracy']['trained']['knn']:.4f}"


def test_few_labels_are_balanced_and_fixed() -> None:
    labels = np.array([0] * 50 + [1] * 4 + [5] * 30)
    chosen = few_label_rows(labels, draw=3)
    assert np.bincount(labels[chosen]).tolist() == [10, 4, 0, 0, 0, 10]
    assert len(set(chosen)) == len(chosen)
    assert np.array_equal(chosen, few_label_rows(labels, draw=3))
    assert not np.array_equal(chosen, few_label_rows(labels, draw=4))


# ---- parts ---------------------------------------------------------------------------------------


def test_collapse_diagnostics_tell_collapse_from_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(400, 8, generator=generator)
    found = collapse(spread, spread, spread)
    assert found.feature_std.item() == pytest.approx(1, abs=0.02)
    assert found.effective_rank.item() == pytest.approx(8, abs=0.1)
    assert found.alignment.item() == 0 and found.uniformity.item() < -3
    point = spread[:1].expand(400, 8)
    found = collapse(point, point, point)
    assert found.feature_std.item() == pytest.approx(0, abs=1e-5)
    assert found.effective_rank.item() == pytest.approx(1, abs=1e-3)
    assert found.uniformity.item() == pytest.approx(0, abs=1e-5)
    opposite = collapse(spread, spread, -spread)
    assert opposite.alignment.item() == pytest.approx(4, abs=1e-5)


def test_views_differ_and_follow_the_generator() -> None:
    config, _ = read_arguments("simclr", [])
    views = TwoViews(config, 1, (8, 8))
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(5)
    view_1, view_2 = views(images)
    assert view_1.shape == view_2.shape == (16, 1, 8, 8)
    assert view_1.min() >= 0 and view_1.max() <= 1
    assert (view_1 != view_2).flatten(1).any(dim=1).all()
    torch.manual_seed(5)
    assert torch.equal(views(images)[0], view_1)


def test_colour_views_keep_shape_and_range() -> None:
    config = TrainConfig(blur=0.5, elastic=1.0, rotate=5.0, erase=0.5, noise=0.1)
    view_1, view_2 = TwoViews(config, 3, (16, 12))(torch.randint(0, 256, (8, 3, 16, 12)))
    assert view_1.shape == view_2.shape == (8, 3, 16, 12)
    assert view_1.isfinite().all() and view_1.min() >= 0 and view_1.max() <= 1


def test_epochs_visit_every_image_in_their_own_order() -> None:
    orders = [epoch_order(100, seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], epoch_order(100, seed=1, epoch=2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_optimizers_decay_matrices_only(name: str) -> None:
    if name == "lars":
        pytest.importorskip("pytorch_optimizer", reason="LARS comes from there")
    config = TrainConfig(optimizer=name, base_lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.bias)
    optimizer = build_optimizer(config, layer)
    size = layer.weight.norm().item()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.bias, torch.ones(3))
    assert layer.weight.norm().item() < size


def rates(schedule_name: str, steps: int, warmup: float, fixed: bool = False) -> list[float]:
    """The learning rate of each step at a peak of 2, and the one after the last."""
    config = TrainConfig(schedule=schedule_name, warmup=warmup, optimizer="sgd", base_lr=2.0)  # type: ignore[arg-type]
    layer = nn.Linear(1, 1)
    optimizer = build_optimizer(config, layer, layer if fixed else None)
    schedule = build_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[-1])
        optimizer.step()
        schedule.step()
    return [*found, schedule.get_last_lr()[-1]]


def test_warmup_then_cosine() -> None:
    found = rates("cosine", 20, warmup=0.2)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[12] == pytest.approx(1.0) and 0 < found[19] < 0.05
    assert found[20] == pytest.approx(0, abs=1e-9)


def test_other_schedules() -> None:
    found = rates("steps", 20, warmup=0.1)
    assert found[:2] == pytest.approx([2 / 3, 4 / 3])
    assert found[2:12] == pytest.approx([2.0] * 10)
    assert found[12:16] == pytest.approx([0.2] * 4) and found[16:] == pytest.approx([0.02] * 5)
    assert rates("constant", 4, warmup=0.0) == [2.0] * 5
    assert rates("cosine", 4, warmup=0.5, fixed=True) == [2.0] * 5, "SimSiam's predictor"


@pytest.mark.parametrize("method", ["simclr", "moco", "moco3"])
def test_two_processes_share_a_run(method: str, digits_file: str, tmp_path: Path) -> None:
    """Two gloo processes train together, with shared negatives, and one writes the run."""
    # As torchrun does it: whoever chose the port has it open, and the processes are its clients.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = tmp_path / "run"
    words = ["--run", str(folder), "--data", digits_file, *SMALL, "--epochs", "2", "--threads", "1"]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(PYTHON_FOLDER), str(ROOT), *sys.path]),
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "ssltrain", method, *words, "--evaluate", "false"],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = [process.communicate(timeout=HANGS_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], done
    assert done[1][0] == ""  # the second process prints nothing
    state = checkpoint(folder)
    assert state["step"] == 8 and len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])
    if method == "moco":
        assert state["method"]["queue.fill"].item() == 128
    assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"]
