# SPDX-License-Identifier: Apache-2.0
"""The commands on the folders of runs: eval, plot, embed, neighbors, export, compare, report."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ssltrain.config import GENERATIVE, SWITCH, OneLineParser, TrainConfig, flag
from ssltrain.data import DataOptions, ImageData, absolute, check_evaluated, load
from ssltrain.errors import UserError, note
from ssltrain.evaluate import all_features, embed, table, trained_encoder
from ssltrain.evaluate import evaluate as score_all
from ssltrain.export import FORMATS, write_encoder
from ssltrain.parallel import choose_device
from ssltrain.plots import draw_confusion, draw_loss, draw_map
from ssltrain.runs import RunFolder, replaced


def _parser(command: str, purpose: str) -> OneLineParser:
    return OneLineParser(
        prog=f"ssltrain {command}", description=purpose, allow_abbrev=False, default_env=False
    )


def _run_parser(command: str, purpose: str) -> OneLineParser:
    """A parser of a command that uses the encoder of a run on images."""
    parser = _parser(command, purpose)
    parser.add_argument("run_folder", type=str, help="folder of a run")
    parser.add_argument("--data", type=str, help="data set; the default is the one of the run")
    parser.add_argument(
        "--checkpoint", type=str, default="latest", help="latest, best, or a kept epoch"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or another")
    for name in ("skip_bad_images", "accept_changed_data"):
        item = TrainConfig.__dataclass_fields__[name]
        text = item.metadata["help"]
        parser.add_argument(flag(name), type=bool, default=False, help=text, **SWITCH)
    return parser


class Opened(NamedTuple):
    """A run, one of its checkpoints, and the data that a command uses it on."""

    folder: RunFolder
    config: TrainConfig
    state: dict[str, Any]
    data: ImageData


def open_run(options: dict[str, Any], scores: bool = False) -> Opened:
    """Open a run for the options of ``_run_parser``; ``scores``: accuracies will be computed."""
    folder = RunFolder.open(options["run_folder"])
    config = dataclasses.replace(
        TrainConfig.load(folder.config),
        device=options["device"],
        skip_bad_images=options["skip_bad_images"],
        accept_changed_data=options["accept_changed_data"],
    )
    state = folder.read_checkpoint(options["checkpoint"])
    if options["data"] is not None:
        size = state["data"]["size"] if "data" in state else []
        if len(set(size)) == 1:  # other images are brought to the size that was trained on
            config = dataclasses.replace(config, image_size=size[0])
        config = dataclasses.replace(config, data=absolute(options["data"]))
    data = load(config.data, DataOptions.of(config))
    for sentence in data.notes:
        note(sentence)
    check_evaluated(state.get("data"), data, config.accept_changed_data, scores)
    return Opened(folder, config, state, data)


def evaluate_and_draw(opened: Opened, scores: bool) -> None:
    """Evaluate (where asked), draw the plots, and print where everything is."""
    folder, config, state, data = opened
    device = choose_device(config.device)
    features = all_features(state, config, data, device)
    written = []
    if scores and config.method == "clip":
        from ssltrain.retrieval import evaluate_pairs

        written += evaluate_pairs(folder, state, config, data, device)
        scores = data.has_labels
    if scores:
        results = score_all(folder, config, data, features)
        print(table(results))
        written.append(folder.results)
        if results["confusion"] is not None:
            draw_confusion(folder, config, data.name, results)
            written.append(folder.confusion_plot)
    elif not data.has_labels and not written:
        print(f"{data.name} {data.unlabelled}: no probes, only the plots")
    if config.method in GENERATIVE:
        from ssltrain.pictures import evaluate_images

        written += evaluate_images(folder, state, config, data, device)
    if folder.read_metrics():
        draw_loss(folder, config, data.name)
        written.append(folder.loss_plot)
    draw_map(folder, config, data, features)
    written.append(folder.map_plot)
    print("wrote " + ", ".join(str(path) for path in written), flush=True)


def _eval(arguments: list[str]) -> int:
    parser = _run_parser("eval", "evaluate a checkpoint of a run, and draw it")
    opened = open_run(parser.parse_args(arguments).as_dict(), scores=True)
    if opened.data.unlabelled and opened.config.method != "clip":
        raise UserError(
            f"{opened.data.name} {opened.data.unlabelled}; the evaluation needs two classes"
        )
    evaluate_and_draw(opened, scores=True)
    return 0


def _plot(arguments: list[str]) -> int:
    parser = _run_parser("plot", "draw the loss curve and the map of the embeddings of a run")
    evaluate_and_draw(open_run(parser.parse_args(arguments).as_dict()), scores=False)
    return 0


def _embed(arguments: list[str]) -> int:
    parser = _run_parser("embed", "write the features of a data set as .npz or .csv")
    parser.add_argument(
        "--out", type=str, help="file; .csv makes a table (default: RUN/embeddings.npz)"
    )
    options = parser.parse_args(arguments).as_dict()
    opened = open_run(options)
    data, config = opened.data, opened.config
    encoder = trained_encoder(opened.state, config, data)
    device = choose_device(config.device)
    features = {
        name: embed(encoder, part.images, device)
        for name, part in (("train", data.train), ("test", data.test))
    }
    out = Path(options["out"]).expanduser() if options["out"] else opened.folder.embeddings
    write = _write_csv if out.suffix == ".csv" else _write_npz
    try:
        write(out, data, features)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    shapes = ", ".join(f"{name}_features {list(found.shape)}" for name, found in features.items())
    print(f"wrote {out}: {shapes}")
    return 0


def _write_npz(out: Path, data: ImageData, features: dict[str, np.ndarray]) -> None:
    arrays: dict[str, Any] = {"class_names": np.array(data.class_names, dtype=np.str_)}
    for name, part in (("train", data.train), ("test", data.test)):
        arrays[f"{name}_features"] = features[name]
        if part.labels is not None:
            arrays[f"{name}_labels"] = part.labels
    with replaced(out) as file:  # a file object: np.savez would add .npz to another suffix
        np.savez(file, **arrays)


def _write_csv(out: Path, data: ImageData, features: dict[str, np.ndarray]) -> None:
    """A line an image: part, name, class (empty without one) and the features."""
    with out.open("w", newline="", errors="backslashreplace") as file:
        writer = csv.writer(file)
        width = features["train"].shape[1]
        writer.writerow(["part", "image", "class", *(f"f{i}" for i in range(width))])
        for name, part in (("train", data.train), ("test", data.test)):
            for row, values in enumerate(features[name]):
                label = -1 if part.labels is None else int(part.labels[row])
                words = [name, part.title(row), data.class_names[label] if label >= 0 else ""]
                writer.writerow([*words, *(f"{value:.7g}" for value in values)])


def _neighbors(arguments: list[str]) -> int:
    parser = _run_parser("neighbors", "draw test images and the training images nearest to them")
    parser.add_argument("--queries", type=int, default=10, help="test images, one a line")
    parser.add_argument("--count", type=int, default=8, help="neighbours of each")
    parser.add_argument("--out", type=str, help="picture (default: RUN/neighbors.png)")
    options = parser.parse_args(arguments).as_dict()
    for name in ("queries", "count"):
        if options[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {options[name]}")
    from ssltrain.gallery import draw_neighbours

    opened = open_run(options)
    encoder = trained_encoder(opened.state, opened.config, opened.data)
    out = Path(options["out"]).expanduser() if options["out"] else opened.folder.neighbors_plot
    device = choose_device(opened.config.device)
    draw_neighbours(
        out, opened.config, opened.data, encoder, device, options["queries"], options["count"]
    )
    print(f"wrote {out}")
    return 0


def _export(arguments: list[str]) -> int:
    parser = _parser("export", "write the encoder of a run for use without ssltrain")
    parser.add_argument("run_folder", type=str, help="folder of a run")
    parser.add_argument(
        "--checkpoint", type=str, default="latest", help="latest, best, or a kept epoch"
    )
    parser.add_argument(
        "--format",
        type=Literal["torch", "safetensors", "onnx"],
        default="torch",
        help="a state dict of torch, the same as safetensors, or the network as ONNX",
    )
    parser.add_argument("--out", type=str, help="file (default: RUN/encoder.pt or the like)")
    options = parser.parse_args(arguments).as_dict()
    folder = RunFolder.open(options["run_folder"])
    config = TrainConfig.load(folder.config)
    state = folder.read_checkpoint(options["checkpoint"])
    suffix = FORMATS[options["format"]]
    out = Path(options["out"]).expanduser() if options["out"] else folder.path / f"encoder{suffix}"
    print(f"wrote {out}; to use it:\n\n{write_encoder(out, options['format'], config, state)}")
    return 0


def _compare(arguments: list[str]) -> int:
    from ssltrain.compare import comparison, draw_comparison

    parser = _parser("compare", "one table and one picture of several runs")
    parser.add_argument("run_folder", type=str, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=str, default="comparison.png", help="the picture")
    options = parser.parse_args(arguments).as_dict()
    folders = [RunFolder.open(path) for path in options["run_folder"]]
    print(comparison(folders))
    draw_comparison(Path(options["out"]).expanduser(), folders)
    print(f"wrote {options['out']}")
    return 0


def _report(arguments: list[str]) -> int:
    from ssltrain.report import write_report

    parser = _parser("report", "one HTML page with everything about a run")
    parser.add_argument("run_folder", type=str, help="folder of a run")
    folder = RunFolder.open(parser.parse_args(arguments).as_dict()["run_folder"])
    print(f"wrote {write_report(folder)}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "eval": _eval,
    "plot": _plot,
    "embed": _embed,
    "neighbors": _neighbors,
    "export": _export,
    "compare": _compare,
    "report": _report,
}
