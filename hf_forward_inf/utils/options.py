"""Dataclasses as options: help from their docstrings, checks from their fields; [`parser`] reads them from words."""

import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

ARGUMENT = re.compile(r"    (\w+)(?: \(.*?\))?: (.*)")
"""The first line of an argument in the `Args` section of a docstring: its name and the beginning of its text."""
MARKUP = re.compile(r"\[?`([^`]*)`\]?")
REFERENCE = re.compile(r" \(\[`[^`]*`\]\)")
"""A reference in brackets to another docstring, which only readers of the code can follow."""


@dataclass
class RunOptions:
    """Options of every run.

    Each field has its help in the `Args` section of its class, and its limits in its metadata ([`check_fields`]).

    Args:
        output (`str`): Folder for metrics, attribution and report.
        overwrite (`bool`, defaults to `False`): Replace a finished run in the output folder.
        top_k (`int`, defaults to 100): Candidates of each query kept in the attribution.
        seed (`int`, defaults to 0): Seeds whatever is drawn at random.
    """

    output: str = "outputs"
    overwrite: bool = False
    top_k: int = field(default=100, metadata={"min": 1})
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "--")


def check_fields(options: Any, prefix: str = "") -> None:
    """Refuse values outside the limits in the metadata of their fields.

    `{"min": 1}` and `{"max": 9}` ask for at least and at most, `{"above": 0}` and `{"below": 1}` for more and less,
    `{"choices": (...)}` for one of several; of a list, each element is checked. `None` means unset and passes.

    Args:
        options: A dataclass instance.
        prefix (`str`, defaults to `""`): Precedes the names of fields in messages.

    Raises:
        ValueError: Names the field, the limit and the value.
    """
    for one in dataclasses.fields(options):
        given = getattr(options, one.name)
        for value in given if isinstance(given, list | tuple) else [given]:
            limit = None if value is None else _broken(value, one.metadata)
            if limit:
                raise ValueError(f"{prefix}{one.name} must be {limit}, not {value!r}.")


def _broken(value: Any, limits: Any) -> str | None:
    """Return the limit that a value breaks, in words."""
    if limits.keys() & {"min", "above", "below"} and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "a number"
    if "choices" in limits and value not in limits["choices"]:
        return f"one of {', '.join(map(str, limits['choices']))}"
    if "min" in limits and not value >= limits["min"]:
        return f"at least {limits['min']}"
    if "max" in limits and not value <= limits["max"]:
        return f"at most {limits['max']}"
    if "above" in limits and not value > limits["above"]:
        return f"above {limits['above']}"
    if "below" in limits and not value < limits["below"]:
        return f"below {limits['below']}"
    return None


def argument_texts(kind: type) -> dict[str, str]:
    """Return the text of each argument in the `Args` sections of a class and its bases, as plain text."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nArgs:\n")
        name = ""
        for line in section.splitlines():
            if line and not line.startswith("    "):
                break
            if first := ARGUMENT.fullmatch(line):
                name, texts[first[1]] = first[1], first[2]
            elif name:
                texts[name] = f"{texts[name]} {line.strip()}".strip()
    return {name: MARKUP.sub(r"\1", REFERENCE.sub("", text)) for name, text in texts.items()}


def description(kind: Any) -> str:
    """Return the docstring of a class or function up to its `Args`, or other, section."""
    return MARKUP.sub(r"\1", re.split(r"\n\w+:\n", inspect.cleandoc(kind.__doc__ or ""), maxsplit=1)[0]).strip()
