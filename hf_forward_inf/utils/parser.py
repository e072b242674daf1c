"""The parser of a command's options: made from dataclasses, with argparse alone, so that help is quick."""

import dataclasses
import types
from argparse import Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from hf_forward_inf.utils.options import RunOptions, argument_texts
from hf_forward_inf.utils.options import description as documented

SHOWN_AS = {int: "N", float: "X", str: "TEXT"}
"""What stands for a value in the help, by its type."""
GENERAL = {
    "config": "YAML file with options of this command by their names; those on the command line take precedence.",
    "json": "Print the result as JSON on stdout, and nothing else.",
    "quiet": "Print no messages and show no progress, only the result.",
}
"""Options of every command."""
RUN_OPTIONS = {one.name for one in dataclasses.fields(RunOptions)}


class OptionParser(ArgumentParser):
    """Parses the options of one or more dataclasses.

    The help of a field is its text in the docstring's `Args`, unless its metadata has a `help`. `--num_queries` and
    `--num-queries` are the same option, and a switch has an opposite (`--no_baselines`). A field whose metadata says
    `positional` has no dashes. A field that several dataclasses have is one option, given to all of them.

    Args:
        *kinds (`type`): Dataclasses.
        prog (`str`, *optional*): The program's name, for the help.
        description (`str`, *optional*): What it does. Defaults to the docstring of the first dataclass.
    """

    def __init__(self, *kinds: type, prog: str | None = None, description: str | None = None):
        super().__init__(
            prog=prog, description=description or documented(kinds[0]), formatter_class=_Help, allow_abbrev=False,
            add_help=False,
        )  # fmt: skip
        self.kinds = kinds
        self.positionals: list[str] = []
        known: set[str] = set()
        for kind in kinds:
            title = "options" if kind is kinds[0] else documented(kind).partition("\n")[0].partition(" (")[0]
            group = self.add_argument_group(title.removesuffix("."))
            hints, texts = get_type_hints(kind), argument_texts(kind)
            for one in sorted(dataclasses.fields(kind), key=_order):
                if one.init and one.name not in known:
                    known.add(one.name)
                    self._add(group, one, hints[one.name], texts.get(one.name, ""))
        general = self.add_argument_group("of every command")
        general.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        general.add_argument("--config", metavar="FILE", help=GENERAL["config"])
        for name in ("json", "quiet"):
            general.add_argument(f"--{name}", action="store_true", help=GENERAL[name])

    def _add(self, group: Any, one: Field, hint: Any, text: str) -> None:
        """Add the option of a field."""
        kind, several = _value_type(hint)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        required = default is MISSING
        options: dict[str, Any] = {"default": None if required else default}
        options["help"] = one.metadata.get("help", text).replace("%", "%%")
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif kind is not bool:
            shown = one.name.upper() if one.metadata.get("positional") else SHOWN_AS.get(kind, "VALUE")
            options |= {"type": kind, "metavar": shown}
        if several:
            options["nargs"] = "+"
        if one.metadata.get("positional"):
            self.positionals.append(one.name)
            group.add_argument(one.name, nargs=None if required else "?", **options)
        elif kind is bool:
            group.add_argument(f"--{one.name}", action=_Switch, **options)
        else:
            group.add_argument(f"--{one.name}", required=required, **options)

    def parse(self, arguments: Sequence[str]) -> tuple[tuple[Any, ...], Namespace]:
        """Return an instance of each dataclass, and all options; exit with status 2 and a line if one is wrong."""
        words = [_underscored(word) for word in arguments]
        self._check_names(word for word in words if word.startswith("--") and word != "--")
        first = ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        file = first.parse_known_args(words)[0].config
        given = self.parse_args([*self._from_file(file), *words] if file else words)
        try:
            made = tuple(
                kind(**{one.name: getattr(given, one.name) for one in dataclasses.fields(kind) if one.init})
                for kind in self.kinds
            )
        except (ValueError, TypeError) as error:
            self.error(str(error))
        return made, given

    def _check_names(self, words: Iterable[str], where: str = "") -> None:
        for word in words:
            name = word.partition("=")[0]
            if name not in self._option_string_actions:
                self.error(f"{where}there is no option {name}.{did_you_mean(name, self._option_string_actions)}")

    def _from_file(self, file: str) -> list[str]:
        """Return what a YAML file says as words of the command line."""
        import yaml

        try:
            said = yaml.safe_load(Path(file).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            self.error(f"--config {file} can't be read: {' '.join(str(error).split())}")
        if not isinstance(said, dict):
            self.error(f"--config {file} must hold options by their names, such as `radius: 2`.")
        options = {_underscored(f"--{name}"): value for name, value in said.items()}
        self._check_names(options, f"{file}: ")
        return [word for name, value in options.items() for word in self._words(name, value, file)]

    def _words(self, name: str, value: Any, file: str) -> list[str]:
        if value is None:
            return []
        if isinstance(self._option_string_actions[name], _Switch):
            if not isinstance(value, bool):
                self.error(f"{file}: {name[2:]} must be true or false, not {value!r}.")
            return [name if value else f"--no_{name[2:]}"]
        if isinstance(value, list):
            return [name, *map(str, value)] if value else []
        return [f"{name}={value}"]

    def format_usage(self) -> str:
        """Return what must be given, what may be given without a name, and that there is more."""
        shown = [_usage_of(action) for action in self._actions if action.required or not action.option_strings]
        return f"usage: {' '.join([self.prog, *shown])} [options]\n"

    def format_help(self) -> str:
        """Return the usage, what the command does, and all options."""
        return f"{self.format_usage()}\n{super().format_help().partition(self.BREAK)[2]}"

    BREAK = "\x00"
    """Separates argparse's own usage from the rest of the help."""

    def error(self, message: str) -> NoReturn:
        """Print a message and where to read more, and exit with status 2."""
        self.exit(2, f"error: {message}{'' if message[-1] in '.?' else '.'}\n{self.prog} --help lists all options.\n")


def _usage_of(action: Action) -> str:
    value = action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}"
    word = f"{action.option_strings[0]} {value}" if action.option_strings else str(value)
    return word if action.required else f"[{word}]"


class _Switch(Action):
    """Sets a field to `True`, or by its opposite, `--no_...`, to `False`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__([*option_strings, f"--no_{dest}"], dest, nargs=0, **options)

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class _Help(HelpFormatter):
    """Shows defaults that say something, and of a switch the word that changes it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"max_help_position": 28, **options})

    def _format_usage(self, *args: Any) -> str:
        return OptionParser.BREAK

    def _format_action_invocation(self, action: Action) -> str:
        if isinstance(action, _Switch):
            return action.option_strings[1] if action.default else action.option_strings[0]
        return super()._format_action_invocation(action)

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if isinstance(action, _Switch) and action.default:
            return f"Do not {text[:1].lower()}{text[1:]}"
        if action.default is None or action.default is False or action.default == [] or action.dest == "help":
            return text
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else action.default
        return f"{text} (default: {str(shown).replace('%', '%%')})"


def _order(one: Field) -> tuple[bool, bool]:
    """Sort what must be given first, and what every run has last."""
    optional = one.default is not MISSING or one.default_factory is not MISSING
    return optional, one.name in RUN_OPTIONS


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that names the closest known word; empty if none is close."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _underscored(word: str) -> str:
    """Return an option's word with underscores: `--num-queries=3` is `--num_queries=3`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _value_type(hint: Any) -> tuple[Any, bool]:
    """Return the type of a field's value, or of each of several, and whether there are several."""
    if get_origin(hint) in (types.UnionType, Union):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) in (list, tuple):
        return get_args(hint)[0], True
    return hint, False
