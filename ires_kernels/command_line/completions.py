"""Completions for shells, made of the parser: of commands, of options, and of values where they are few."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ires_kernels.command_line.streams import say

SHELLS = ("bash", "zsh", "fish")

_PATHS = ("PATH", "OUT", "I:B", "I:B[:A]")
"""Metavars of options whose value is completed as the name of a file."""

_BASH = """\
_ires() {{
    local command="" current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${{COMP_WORDS[i]}} in {commands}) command=${{COMP_WORDS[i]}}; break;; esac
    done
    COMPREPLY=()
    case $command:$before in
{values}
    esac
    case $command:$current in
{options}
    :*) COMPREPLY=($(compgen -W "{words}" -- "$current"));;
    esac
}}
complete -o default -F _ires ires
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


class Option(NamedTuple):
    """An option of a command: its spellings, the first words of its help, its values, if they are few, or of a path."""

    names: tuple[str, ...]
    text: str
    choices: tuple[str, ...]
    takes_value: bool
    takes_path: bool


def run(arguments: argparse.Namespace) -> int:
    """Print what a shell is to source."""
    commands = {name: _options(parser) for name, parser in arguments.commands.choices.items()}
    positional = {name: _values(parser) for name, parser in arguments.commands.choices.items()}
    if arguments.shell == "fish":
        texts = {each.dest: each.help or "" for each in arguments.commands._choices_actions}
        say("\n".join(_fish(commands, positional, texts)))
    else:
        say((_ZSH if arguments.shell == "zsh" else "") + _bash(commands, positional).rstrip("\n"))
    return 0


def _options(parser: argparse.ArgumentParser) -> list[Option]:
    return [
        Option(
            tuple(action.option_strings),
            (action.help or "").partition(";")[0].partition("(")[0].strip(),
            tuple(action.choices or ()),
            action.nargs != 0,
            action.metavar in _PATHS,
        )
        for action in parser._actions
        if action.option_strings
    ]


def _values(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Values of arguments that are no options, where they are few."""
    return tuple(value for action in parser._actions if not action.option_strings for value in action.choices or ())


def _bash(commands: Mapping[str, list[Option]], positional: Mapping[str, tuple[str, ...]]) -> str:
    values, options = [], []
    for command, found in commands.items():
        for option in found:
            if option.takes_value:
                reply = f'COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$current")); ' * bool(option.choices)
                values.append(f"    {'|'.join(f'{command}:{name}' for name in option.names)}) {reply}return;;")
        words = " ".join(name for option in found for name in option.names)
        options.append(f'    {command}:-*) COMPREPLY=($(compgen -W "{words}" -- "$current"));;')
        if positional[command]:
            words = " ".join(positional[command])
            options.append(f'    {command}:*) COMPREPLY=($(compgen -W "{words}" -- "$current"));;')
    return _BASH.format(
        commands="|".join(commands), values="\n".join(values), options="\n".join(options),
        words=" ".join([*commands, "--help", "--version"]),
    )  # fmt: skip


def _fish(
    commands: Mapping[str, list[Option]], positional: Mapping[str, tuple[str, ...]], texts: Mapping[str, str]
) -> Iterable[str]:
    for command, found in commands.items():
        yield f"complete -c ires -n __fish_use_subcommand -x -a {command} -d {shlex.quote(texts.get(command, ''))}"
        here = f"complete -c ires -n '__fish_seen_subcommand_from {command}'"
        if positional[command]:
            yield f"{here} -x -a {shlex.quote(' '.join(positional[command]))}"
        for option in found:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            takes = "" if not option.takes_value else " -r -F" if option.takes_path else " -x"
            takes += f" -a {shlex.quote(' '.join(option.choices))}" if option.choices else ""
            yield f"{here} {names}{takes} -d {shlex.quote(option.text)}"
