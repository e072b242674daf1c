import importlib
import re
import subprocess
import sys
from functools import cache, partial
from itertools import count

import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher

from hf_forward_inf.toys.classifiers import IMAGENET, Normalised
from hf_forward_inf.utils.callables import fingerprint_of_callable

SOURCE = """
from dataclasses import dataclass
import {helper} as helper
import numpy as np

SHIFT = 1

def transform(image):
    return np.tanh(scaled(image) + SHIFT)

def scaled(image):
    return image * helper.factor(image)

def late(image):
    from {helper} import factor
    return factor(image)

def outer(power):
    return lambda image: image ** power

@dataclass(frozen=True)
class Scale:
    mean: float = 0.5

    def __call__(self, image):
        return scaled(image - self.mean)
"""
HELPER = "def factor(image):\n    return 2\n"
EDITS = {
    "its own line": lambda source, helper: (source.replace("np.tanh(", "np.sin("), helper),
    "a value that it reads": lambda source, helper: (source.replace("SHIFT = 1", "SHIFT = 2"), helper),
    "a function that it calls": lambda source, helper: (source.replace("image * ", "image / "), helper),
    "a function of another module": lambda source, helper: (source, helper.replace("2", "3")),
}
names = count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write and import a module and a helper that it imports, each time under another name."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(source=SOURCE, helper=HELPER):
        name = f"{'a' * (next(names) % 3)}module{next(names)}"
        (tmp_path / f"{name}_helper.py").write_text(helper)
        (tmp_path / f"{name}.py").write_text(source.format(helper=f"{name}_helper"))
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return module


KINDS = {
    "a function": lambda module: module.transform,
    "a closure": lambda module: module.outer(2),
    "a partial": lambda module: partial(module.transform),
    "a cached function": lambda module: cache(module.transform),
    "a dataclass": lambda module: module.Scale(),
    "a bound method": lambda module: module.Scale().__call__,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_module_changes_no_key(kind, module):
    one, other = KINDS[kind](module()), KINDS[kind](module())
    assert fingerprint_of_callable(one) == fingerprint_of_callable(other)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_function_has_another_key(edit, module):
    before, after = module().transform, module(*EDITS[edit](SOURCE, HELPER)).transform
    assert fingerprint_of_callable(before) != fingerprint_of_callable(after)


@pytest.mark.parametrize("edit", ["a function that it calls", "a function of another module"])
def test_an_edited_dataclass_has_another_key(edit, module):
    before, after = module().Scale(), module(*EDITS[edit](SOURCE, HELPER)).Scale()
    assert fingerprint_of_callable(before) != fingerprint_of_callable(after)


def test_what_is_imported_when_a_function_runs_counts(module, monkeypatch):
    late = module(SOURCE.replace("from {helper} import", "from moving_helper import")).late
    keys = []
    for factor in ("2", "3"):
        monkeypatch.setitem(sys.modules, "moving_helper", module(HELPER.replace("2", factor)))
        keys.append(fingerprint_of_callable(late))
    assert keys[0] != keys[1]


def test_values_count_wherever_a_callable_holds_them(module):
    scale, outer = module().Scale, module().outer
    array, other = np.arange(3.0), np.array([0.0, 1.0, 5.0])
    pairs = [
        (scale(0.5), scale(0.25)),
        (outer(2), outer(3)),
        (outer(array), outer(other)),
        (outer(torch.tensor(array)), outer(torch.tensor(other))),
        (partial(np.add, 1), partial(np.add, 2)),
        (np.tanh, np.sin),
        (outer(re.compile("a")), outer(re.compile("b"))),
        (Normalised((0.5,), (1.0,)), Normalised((0.5,), (2.0,))),
    ]
    for one, another in pairs:
        assert fingerprint_of_callable(one) != fingerprint_of_callable(another)
    assert fingerprint_of_callable(outer(array)) == fingerprint_of_callable(outer(array.copy()))


def test_a_key_is_the_same_after_a_call_and_in_another_process():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    before = fingerprint_of_callable(IMAGENET)
    IMAGENET(image)
    assert fingerprint_of_callable(IMAGENET) == before
    program = (
        "from hf_forward_inf.toys.classifiers import IMAGENET\n"
        "from hf_forward_inf.utils.callables import fingerprint_of_callable\n"
        "print(fingerprint_of_callable(IMAGENET))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == before


def test_what_can_not_be_read_is_pickled(tmp_path):
    with (tmp_path / "file").open("w") as file:
        function = partial(print, file=file)
        assert fingerprint_of_callable(function) == Hasher.hash(function)


def test_functions_that_call_each_other_are_read_once(module):
    source = "def even(n):\n    return n == 0 or odd(n - 1)\n\ndef odd(n):\n    return n > 0 and even(n - 1)\n"
    one, other = module(source), module(source)
    assert fingerprint_of_callable(one.even) == fingerprint_of_callable(other.even)
    assert fingerprint_of_callable(one.even) != fingerprint_of_callable(one.odd)
