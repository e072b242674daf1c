"""Cache keys of functions and callable objects: by what they do, not by the module that they are in."""

import copyreg
import dis
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, UnionType
from typing import Any

from datasets.fingerprint import Hasher
from torch import Tensor

from hf_forward_inf.utils.hashes import bytes_of, fingerprint

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
OWN = __name__.partition(".")[0]
INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
NOT_CODE = ("_abc_impl", "__dataclass_fields__", "__annotate__", "__annotate_func__")
"""What a class holds that differs between runs or only repeats its fields."""


def fingerprint_of_callable(function: Callable[..., Any]) -> str:
    """Hash a function or a callable object by its code and its values.

    A function counts with its defaults, its closure and the globals, functions and classes that its code names, also
    those of other modules; an object with its class and its fields. Module names, file names and line numbers don't
    count, except for installed packages, which count by name, version and file instead of being read.

    Args:
        function (`Callable`): What to hash.

    Returns:
        `str`: Equal for equal code and values, in every process. Of what can't be read this way, such as a function
        that uses an open file, the hash of its pickle.

    Raises:
        TypeError: If it can't be pickled either.
    """
    try:
        return _Reader().key(function)
    except (TypeError, RecursionError):
        return Hasher.hash(function)


class _Reader:
    """Reads one object and all that it refers to, each once."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, frozenset[str]], tuple[Any, str]] = {}

    def key(self, value: Any, names: frozenset[str] = frozenset()) -> str:
        """Hash any value; of a module, only what is called by `names`."""
        if type(value) in PLAIN:
            return fingerprint(type(value).__name__, repr(value))
        place = id(value), names
        if place not in self.seen:  # the value is stored too: an id is unique only while its object lives
            self.seen[place] = value, f"recursion {len(self.seen)}"
            self.seen[place] = value, fingerprint(type(value).__name__, *self.parts(value, names))
        return self.seen[place][1]

    def parts(self, value: Any, names: frozenset[str]) -> Iterator[Any]:
        """Describe a value by strings and by the keys of what it refers to."""
        if isinstance(value, Tensor):
            yield from (str(value.dtype), list(value.shape), bytes_of(value.detach()))
        elif type(value) in (list, tuple):
            yield from map(self.key, value)
        elif isinstance(value, UnionType):
            yield from map(self.key, value.__args__)
        elif type(value) is dict:
            yield from ([self.key(name), self.key(part)] for name, part in value.items())
        elif type(value) in (set, frozenset):
            yield from sorted(map(self.key, value))
        elif isinstance(value, CodeType):
            yield from self.code(value)
        elif isinstance(value, ModuleType):
            yield from self.module(value, names)
        elif isinstance(value, FunctionType | type) and _is_installed(value.__module__):
            yield from (value.__qualname__, *_version_of(value.__module__))
        elif isinstance(value, FunctionType):
            yield from self.function(value)
        elif isinstance(value, type):
            yield from self.members(value)
        elif inspect.isroutine(getattr(value, "__wrapped__", None)):  # functools.cache
            yield self.key(value.__wrapped__)
        else:
            yield from self.instance(value)

    def code(self, code: CodeType) -> Iterator[Any]:
        """Describe the instructions and their constants, other code among them."""
        yield from (code.co_code, getattr(code, "co_exceptiontable", b""), code.co_flags, code.co_argcount)
        yield from (code.co_kwonlyargcount, code.co_posonlyargcount)
        yield from map(list, (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
        yield from map(self.key, code.co_consts)

    def function(self, function: FunctionType) -> Iterator[str]:
        """Describe a function's code and every value that it reads without being given it."""
        yield from map(self.key, (function.__code__, function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                yield self.key(cell.cell_contents)
            except ValueError:
                yield "an empty cell"
        codes = list(_nested(function.__code__))
        attributes = frozenset(name for code in codes for name in code.co_names)
        read, imported = _globals_and_imports(codes, function.__globals__.get("__package__"))
        for name in sorted(read & function.__globals__.keys()):
            value = function.__globals__[name]
            yield self.key(value, attributes if isinstance(value, ModuleType) else frozenset())
        yield from (self.key(module, attributes) for module in imported)

    def module(self, module: ModuleType, names: frozenset[str]) -> Iterator[Any]:
        """Describe an installed module by its version, another one by its values that are called by `names`."""
        if _is_installed(module.__name__):
            yield from _version_of(module.__name__)
            return
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            yield [name, self.key(value, names if isinstance(value, ModuleType) else frozenset())]

    def members(self, kind: type) -> Iterator[Any]:
        """Describe a class: its name, bases, methods and values."""
        yield kind.__name__
        yield from map(self.key, kind.__bases__)
        for name, member in vars(kind).items():
            inner = next((m for m in (getattr(member, n, None) for n in ("__func__", "fget", "func")) if m), member)
            special = name.startswith("__") or name in NOT_CODE or inspect.isdatadescriptor(inner)
            if (isinstance(inner, FunctionType) and name not in NOT_CODE) or not special:
                yield [name, type(member).__name__, self.key(inner)]

    def instance(self, value: Any) -> Iterator[Any]:
        """Describe an object by what pickle would take it apart into; pickle it where that is only a name."""
        reduce = copyreg.dispatch_table.get(type(value))
        taken_apart = reduce(value) if reduce else value.__reduce_ex__(4)
        if isinstance(taken_apart, str):
            module = getattr(value, "__module__", None) or type(value).__module__
            yield from (taken_apart, *(_version_of(module) if _is_installed(module) else (Hasher.hash(value),)))
            return
        constructor, arguments, *rest = taken_apart
        state, items, pairs = (*rest, None, None, None)[:3]
        yield from map(self.key, (constructor, arguments, state, list(items or ()), dict(pairs or ())))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _globals_and_imports(codes: list[CodeType], package: str | None) -> tuple[set[str], list[ModuleType]]:
    """Return the globals that code reads, without `__name__` and its kind, and the modules that it imports."""
    read: set[str] = set()
    imported: list[ModuleType] = []
    for code in codes:
        before: list[Any] = [0, 0]
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not instruction.argval.startswith("__"):
                read.add(instruction.argval)
            if instruction.opname == "IMPORT_NAME":
                level, members = before[-2:]
                imported += _imported("." * level + instruction.argval, members or (), package)
            before.append(instruction.argval)
    return read, imported


def _imported(name: str, members: tuple[str, ...], package: str | None) -> list[ModuleType]:
    """Import what a function would import, so that its key is the same before its first call and after it."""
    try:
        module = importlib.import_module(resolve_name(name, package))
        for member in members:
            if member != "*" and not hasattr(module, member):
                importlib.import_module(f"{module.__name__}.{member}")
    except ImportError:  # the function's own affair: it may catch this
        return []
    return [module]


def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package other than this one."""
    top = (module or "").partition(".")[0]
    if top == OWN:
        return False
    file = getattr(sys.modules.get(module or "") or sys.modules.get(top), "__file__", None)
    if file is None:
        return top in sys.stdlib_module_names
    path = Path(file)
    return any(path.is_relative_to(folder) for folder in INSTALLED) or "site-packages" in path.parts


def _version_of(module: str) -> Iterator[Any]:
    """Describe an installed module by its name, its package's version and, if it is of Python's, its source."""
    yield from (module, str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", "")))
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    yield Path(file).read_bytes() if file.endswith(".py") else b""
