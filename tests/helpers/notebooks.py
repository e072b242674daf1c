"""Notebooks, run in this process: their code cells one after the other, with smaller parameters."""

import ast
import json

from tests.helpers.pages import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"


def code_cells(name):
    """The code of a notebook's cells, and whether the cell is the one of parameters."""
    cells = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), "parameters" in cell["metadata"].get("tags", ())


def run_notebook(name, **parameters):
    """Run a notebook with other values of its parameters, and return all names that it has defined."""
    names = {}
    for number, (code, of_parameters) in enumerate(code_cells(name)):
        exec(compile(code, f"{name}, code cell {number}", "exec"), names)
        if of_parameters:
            known = {target.id for line in ast.parse(code).body for target in getattr(line, "targets", ())}
            assert set(parameters) <= known
            names.update(parameters)
    return names
