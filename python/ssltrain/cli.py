# SPDX-License-Identifier: Apache-2.0
"""The command ``ssltrain``: train, evaluate, embed, plot."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssltrain.config import (
    GENERATIVE,
    METHODS,
    RESUMABLE_FIELDS,
    TITLES,
    OneLineParser,
    TrainConfig,
    config_parser,
    flag,
)
from ssltrain.errors import UserError, note
from ssltrain.presets import RECIPES, recipe, recipe_names

# torch, kornia, scikit-learn and matplotlib take seconds to import: the functions below import
# them when they are needed, so that help and a mistyped flag answer at once.
if TYPE_CHECKING:
    from ssltrain.runs import RunFolder

USAGE = """\
usage: ssltrain METHOD [--data DATA] [flags]   train, evaluate and draw
       ssltrain METHOD --resume RUN            continue a run bit for bit, or for more --epochs
       ssltrain METHOD --init-from RUN         start a new run from the weights of another
       ssltrain METHOD --recipe NAME           start with the settings of a paper
       ssltrain METHOD --dry-run [flags]       say what a run would be, and write nothing
       ssltrain memory METHOD [flags]          predict and measure where memory goes
       ssltrain demo [flags]                   train SimCLR, BYOL and MoCo on digits
       ssltrain recipes [NAME]                 list or show the settings of papers

       ssltrain eval RUN [--data DATA]         evaluate a run again
       ssltrain plot RUN [--data DATA]         draw a run again
       ssltrain embed RUN [--data DATA]        write the features of a data set
       ssltrain neighbors RUN [--data DATA]    a page of images and what is nearest to them
       ssltrain export RUN --format FORMAT     write the encoder: torch, safetensors or onnx
       ssltrain compare RUN RUN...             one table and one picture of several runs
       ssltrain report RUN                     one HTML page with everything about a run
       ssltrain completion SHELL               a script that completes commands and flags

METHOD is simclr, byol, moco, moco3, simsiam, supcon, clip, autoencoder, vae or gan. Every run has a folder
(the default is runs/METHOD-DATA-seedN). 'ssltrain simclr --help' lists the flags; docs/training.md
explains them.
"""

# Commands on the folders of runs, in ssltrain.commands.
ON_RUNS = ("eval", "plot", "embed", "neighbors", "export", "compare", "report")
SIGNALLED = 128  # shells report a signal as 128 and its number: 130 for Ctrl-C, 143 for SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 2 for an error that the user can put right (one line on stderr), or 130 or 143 when a
        training run was stopped by SIGINT or SIGTERM and left a checkpoint.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what no encoding can print
            stream.reconfigure(errors="backslashreplace")
    if "torch" not in sys.modules:
        # Threads that wait asleep, not spinning: steps here are tens of milliseconds of many short
        # parallel regions, which become ten times as slow when another process needs a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"ssltrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the training loop, which has its own handler
        return SIGNALLED + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _out_of_memory(error)):
            raise
        print(f"ssltrain: error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        where = f" {error.filename}" if error.filename else ""
        print(f"ssltrain: error: cannot use{where}: {error.strerror or error}", file=sys.stderr)
        return 2


def command() -> int:
    """``main`` as a process of its own.

    One of several processes ends without Python's clean-up: threads of gloo may still hold tensors of a
    finished collective, and abort the process when they ask an interpreter that is being taken down for
    its lock.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


OUT_OF_MEMORY = (
    "out of memory; what helps: --micro-batch 64 (the same gradient with fewer activations), a "
    "smaller --batch-size or --image-size, --amp bf16; 'ssltrain memory' says where memory goes"
)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory; on a CPU it has no exception of its own for that."""
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, rest = words[0], words[1:]
    if command in METHODS:
        return _train(command, rest)
    if command in ON_RUNS:
        from ssltrain import commands

        return commands.COMMANDS[command](rest)
    own = {
        "recipes": _recipes,
        "demo": _demo,
        "memory": _memory,
        "completion": _completion,
    }
    if command not in own:
        known = ", ".join([*METHODS, *ON_RUNS, *own])
        raise UserError(f"unknown command '{command}'; choose one of {known}")
    return own[command](rest)


# ---- training --------------------------------------------------------------------------------


def _train(method: str, arguments: list[str]) -> int:
    config, resume = read_arguments(method, arguments)
    code, _ = train(config, resume)
    return code


def read_arguments(method: str, arguments: list[str]) -> tuple[TrainConfig, RunFolder | None]:
    """The configuration of a run, and the folder to resume if ``--resume`` names one.

    A new run starts from the preset of the method and the kind of its data; a resumed one from
    its saved configuration, of which only the flags in RESUMABLE_FIELDS may be changed.

    Raises:
        UserError: a bad flag, file or value.
    """
    prog = f"ssltrain {method}"
    # The first pass only finds out which defaults apply; help must wait for them.
    asks_help = any(word in ("-h", "--help") for word in arguments)
    words = [word for word in arguments if word not in ("-h", "--help")]
    values = _parse(words, TrainConfig(method=_as_method(method)), prog)
    resume = values.pop("resume")
    if resume is None:
        from ssltrain.data import locate

        kind, _ = locate(values["data"])
        defaults, folder = TrainConfig.from_presets(method, values["data"], kind), None
        if values["recipe"]:
            defaults = dataclasses.replace(defaults, **recipe(values["recipe"]))
    else:
        from ssltrain.runs import RunFolder

        folder = RunFolder.open(resume)
        # Where the run was told to stop is behind it: it goes on to the end, or as far as told now.
        # That other data was accepted is behind it too.
        saved = _absolute(TrainConfig.load(folder.config))
        defaults = dataclasses.replace(
            saved, stop_after=0, accept_changed_data=False, dry_run=False
        )
    if asks_help:
        _parser(defaults, prog).print_help()
        raise SystemExit(0)
    values = _parse(words, defaults, prog)
    values.pop("resume")
    config = _absolute(TrainConfig(**values).validate())
    if folder is not None and defaults.method != method:
        raise UserError(f"{resume} is a {defaults.method} run: use 'ssltrain {defaults.method}'")
    if config.method != method:
        raise UserError(f"the configuration is for {config.method}: use 'ssltrain {config.method}'")
    if folder is not None:
        for item in dataclasses.fields(TrainConfig):
            kept, asked = getattr(defaults, item.name), getattr(config, item.name)
            if kept != asked and item.name not in RESUMABLE_FIELDS:
                raise UserError(
                    f"{flag(item.name)} was {kept!r} in {resume} and cannot become {asked!r} on "
                    "--resume; drop the flag, or start a new run"
                )
    return config, folder


def _absolute(config: TrainConfig) -> TrainConfig:
    """The same configuration, whatever the working directory will be when it is used again."""
    from ssltrain.data import absolute

    def place(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if path else ""

    return dataclasses.replace(
        config, data=absolute(config.data), run=place(config.run), init_from=place(config.init_from)
    )


def _as_method(name: str) -> Any:
    return name


def _parser(defaults: TrainConfig, prog: str) -> OneLineParser:
    parser = config_parser(defaults, prog)
    parser.add_argument("--resume", type=str, help="run folder to continue, bit for bit")
    return parser


def _parse(words: list[str], defaults: TrainConfig, prog: str) -> dict[str, Any]:
    values = _parser(defaults, prog).parse_args(words).as_dict()
    values.pop("config", None)
    return values


def train(config: TrainConfig, resume: RunFolder | None = None) -> tuple[int, Path]:
    """Train, evaluate and draw, and print how it went.

    Args:
        config: the run.
        resume: the folder of the run to continue; None starts a new one.

    Returns:
        The exit code and the folder of the run.

    Raises:
        UserError: something in the configuration or the data does not fit.
    """
    from ssltrain.data import DataOptions, load
    from ssltrain.parallel import computes_bf16, world
    from ssltrain.runs import RunFolder
    from ssltrain.trainer import Trainer, check_parts

    with world(config) as processes:
        check_parts(config, processes.size)
        data = load(config.data, DataOptions.of(config))
        for sentence in data.notes:
            note(sentence)
        if data.unlabelled and config.method != "clip":
            note(f"{data.name} {data.unlabelled}: the run is not evaluated by probes")
        if (
            config.amp == "bf16"
            and processes.device.type == "cpu"
            and not computes_bf16(processes.device)
        ):
            note(
                "--amp bf16: this processor does not compute bfloat16 itself, --amp none is faster"
            )
        config = dataclasses.replace(config, pixel_range=data.pixel_range)
        trainer = Trainer(config, data, processes, None)
        config = trainer.config
        if resume is not None and resume.has_begun:
            trainer.restore(resume.read_checkpoint())
        elif config.init_from:
            trainer.start_from(RunFolder.open(config.init_from).read_checkpoint())
        if config.dry_run:
            print(trainer.dry_run(), flush=True)
            return 0, Path()
        if processes.is_main:
            trainer.folder = resume or RunFolder.create(config, data.name)
            trainer.folder.write_environment(sys.argv)
            if resume is not None:
                resume.keep_config(config)
                if trainer.finished:
                    note(
                        f"the run has finished its {config.epochs} epochs; give more --epochs to "
                        "go on"
                    )
            print(
                f"{config.method} on {data.name}: {len(data.train)} training images, "
                f"{trainer.total_steps} steps on {processes.device}; run folder "
                f"{trainer.folder.path}",
                flush=True,
            )
        outcome = trainer.fit()
        if trainer.folder is None:  # another process writes
            return 0, Path()
        print(f"trained for {outcome.seconds:.1f} s at {outcome.images_per_s:,.0f} images/s")
    folder = trainer.folder
    if not outcome.finished:
        print(
            f"stopped at step {trainer.method.step} of {trainer.total_steps}; "
            f"continue with: ssltrain {config.method} --resume {folder.path}"
        )
        return (SIGNALLED + outcome.signal if outcome.signal else 0), folder.path
    if config.evaluate:
        from ssltrain.commands import Opened, evaluate_and_draw

        opened = Opened(folder, config, folder.read_checkpoint(), data)
        evaluate_and_draw(opened, scores=data.has_labels or config.method == "clip")
    return 0, folder.path


def _recipes(arguments: list[str]) -> int:
    """List the recipes, each by the first line of its file, or show one."""
    parser = OneLineParser(
        prog="ssltrain recipes",
        description="settings of the papers, for --recipe and --config",
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("name", type=str, nargs="?", help="recipe to show as a file for --config")
    name = parser.parse_args(arguments).as_dict()["name"]
    if name:
        recipe(name)
        print((RECIPES / f"{name}.yaml").read_text(), end="")
        return 0
    for name in recipe_names():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        print(f"{name:<18}{first.removeprefix('# ')}")
    return 0


def _memory(arguments: list[str]) -> int:
    """Print and draw what a run takes, with the losses of ``sslkernels`` and with plain ones."""
    if not arguments or arguments[0] not in METHODS:
        raise UserError(f"ssltrain memory METHOD [flags]: METHOD is one of {', '.join(METHODS)}")
    if arguments[0] in GENERATIVE:
        raise UserError(
            f"ssltrain memory knows the methods whose losses see embeddings, not {arguments[0]}"
        )
    config, resume = read_arguments(arguments[0], arguments[1:])
    if resume is not None:
        raise UserError("ssltrain memory takes the settings of a new run: drop --resume")
    from ssltrain.memory import draw, measure, table
    from ssltrain.trainer import check_parts

    check_parts(config, 1)
    found = measure(config)
    print(table(found))
    name = Path(config.data.rpartition(":")[2]).stem
    out = Path(f"memory-{config.method}-{name}.png")
    draw(out, config, name, found)
    print(f"wrote {out}")
    return 0


def _completion(arguments: list[str]) -> int:
    """Print a script of completions for a shell."""
    from ssltrain.completion import script

    parser = OneLineParser(
        prog="ssltrain completion",
        description="print completions; eval or source the output",
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("shell", type=Literal["bash", "zsh", "fish"], help="bash, zsh or fish")
    shell = parser.parse_args(arguments).as_dict()["shell"]
    commands = [*METHODS, *ON_RUNS, "recipes", "demo", "memory", "completion"]
    print(script(shell, METHODS, commands, _parser(TrainConfig(), "ssltrain")), end="")
    return 0


DEMO = ("simclr", "byol", "moco")


def _demo(arguments: list[str]) -> int:
    """Train three methods on digits with the same flags, then print them side by side."""
    from ssltrain.evaluate import summary
    from ssltrain.runs import RunFolder

    folders = {}
    for method in DEMO:
        config, resume = read_arguments(method, arguments)
        if resume is not None or config.run:
            raise UserError("ssltrain demo starts three new runs: drop --resume and --run")
        if config.data != "digits":
            raise UserError("ssltrain demo trains on digits: use 'ssltrain simclr --data ...'")
        code, path = train(config)
        if code:
            return code
        folders[TITLES[method]] = RunFolder(path)
    if config.evaluate:
        print("\n" + summary(folders))
    return 0
