"""Recipes as modules."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name):
    """The module of `recipes/{name}.py`."""
    spec = spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
