# SPDX-License-Identifier: Apache-2.0
"""Scripts that let a shell complete commands, flags and the values of flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

FILES = ("--config", "--data", "--resume", "--run", "--init-from", "--out")


def _flags(parser: Any) -> dict[str, list[str]]:
    """The flags of a parser, each with the words it takes (none for a number or a path)."""
    found = {}
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if names and "." not in names[0]:
            kind = getattr(action, "_typehint", None)
            words = ("true", "false") if kind is bool else get_args(kind)
            found[names[0]] = [word for word in words if isinstance(word, str)]
    return found


def script(shell: str, methods: Sequence[str], commands: Sequence[str], parser: Any) -> str:
    """The completion script.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.
        methods: the commands that take the flags of ``parser``.
        commands: all commands, these included.
        parser: the parser of a training command.
    """
    flags = _flags(parser)
    if shell == "fish":
        return _fish(methods, commands, flags)
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    cases = "".join(
        f"    {name}) COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$word\")); return ;;\n"
        for name, words in flags.items()
        if words
    )
    return (
        f"{start}_ssltrain() {{\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"\n'
        '  if [ "$COMP_CWORD" = 1 ]; then\n'
        f"    COMPREPLY=($(compgen -W '{' '.join(commands)}' -- \"$word\")); return\n"
        "  fi\n"
        '  case "$before" in\n'
        f"{cases}"
        f'    {"|".join(FILES)}) COMPREPLY=($(compgen -f -- "$word")); return ;;\n'
        "  esac\n"
        '  case "${COMP_WORDS[1]}" in\n'
        f"    {'|'.join(methods)}|demo) COMPREPLY=($(compgen -W '{' '.join(flags)}' -- \"$word\")) ;;\n"
        '    *) COMPREPLY=($(compgen -f -- "$word")) ;;\n'
        "  esac\n"
        "}\n"
        "complete -o filenames -F _ssltrain ssltrain\n"
    )


def _fish(methods: Sequence[str], commands: Sequence[str], flags: dict[str, list[str]]) -> str:
    first = "__fish_use_subcommand"
    inside = f"__fish_seen_subcommand_from {' '.join(methods)} demo"
    lines = [f"complete -c ssltrain -n {first} -f -a '{' '.join(commands)}'"]
    for name, words in flags.items():
        values = f" -x -a '{' '.join(words)}'" if words else " -r"
        lines.append(f"complete -c ssltrain -n '{inside}' -l {name.removeprefix('--')}{values}")
    return "\n".join(lines) + "\n"
