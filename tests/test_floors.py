"""No import runs upward, and none in a circle: a module knows only what lies on its own floor or below."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, RECIPES = ROOT / "hf_forward_inf", ROOT / "recipes"
FLOORS = [
    "utils",
    "adapters data scores report",
    "ascent attribution plan saving",
    "passes",
    "curvature",
    "baselines",
    "algorithm",
    "tracing",
    "forward_inf",
    "evaluation explorer pipelines",
    "toys",
    "commands",
    "trainers",
    "cli __main__",
    "__init__",
    "recipes",
]
"""Bottom up. A room or module of the package, by its first name; what imports `hf_forward_inf` itself is above it."""
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}


def modules() -> dict[str, Path]:
    """Every module of the package and of the recipes, by its dotted name."""
    found = {}
    for folder, above in ((PACKAGE, ROOT), (RECIPES, RECIPES)):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(above).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """Where a module is: `hf_forward_inf.ascent.steps` is in `ascent`."""
    package, _, rest = module.partition(".")
    if package != "hf_forward_inf":
        return "recipes"
    return rest.partition(".")[0] or "__init__"


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere in it: lazily, or for its types, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES.keys()


ARROWS = {module: imported(path) - {module} for module, path in MODULES.items()}


def file(module: str) -> str:
    return str(MODULES[module].relative_to(ROOT))


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} <= FLOOR.keys()


def test_no_import_runs_upward():
    upward = [
        f"{file(module)} ({room(module)}) imports {file(other)} ({room(other)}), which is above it"
        for module, others in ARROWS.items()
        for other in sorted(others)
        if FLOOR[room(other)] > FLOOR[room(module)]
    ]
    assert not upward, "\n".join(upward)


def test_rooms_do_not_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for module, others in ARROWS.items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others)
    try:
        list(TopologicalSorter({name: to - {name} for name, to in rooms.items()}).static_order())
    except CycleError as error:
        circle = error.args[1]
        files = [
            f"{file(module)} imports {file(other)}"
            for one, two in zip(circle[1:], circle, strict=False)
            for module in MODULES
            for other in ARROWS[module]
            if room(module) == one and room(other) == two
        ]
        pytest.fail("Rooms in a circle: " + " -> ".join(circle) + "\n" + "\n".join(files))


def test_files_do_not_import_each_other_in_a_circle():
    try:
        list(TopologicalSorter(ARROWS).static_order())
    except CycleError as error:
        pytest.fail("Files in a circle: " + " -> ".join(map(file, error.args[1])))
