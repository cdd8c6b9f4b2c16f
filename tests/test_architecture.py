"""The house: imports run downwards only, and the public names are what the design says."""

from __future__ import annotations

import ast
from pathlib import Path

import tinyexperts

PACKAGE = Path(tinyexperts.__file__).parent

# A room may import from itself and from rooms on a lower floor.
FLOORS = [
    {"errors", "extras", "lazy_exports"},
    {"files", "report", "statistics"},
    {"ops"},
    {"layers"},
    {"model", "data", "optim"},
    {"evaluation"},
    {"training"},
    {"planning", "comparison"},
    {"study", "explorer", "lifecycle", "hub"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(source: str) -> set[str]:
    """Rooms of the package that a file imports, wherever in the file it does."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test sees them"
            parts = (node.module or "").split(".")
            if parts[0] == "tinyexperts":
                rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in FLOOR}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tinyexperts.")}
    return rooms


def upward_imports(files: dict[str, str]) -> list[str]:
    """Imports that run upwards or sideways, from files given as path in the package -> source."""
    found = []
    for path, source in files.items():
        room = path.split("/")[0].removesuffix(".py")
        found += [
            f"{path} imports {other}"
            for other in sorted(imported_rooms(source))
            if other != room and FLOOR[other] >= FLOOR[room]
        ]
    return found


def test_imports_run_downwards_only():
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    del files["__init__.py"]  # re-exports the layers
    assert len(files) > 40
    assert upward_imports(files) == []


def test_the_rooms_of_the_study_stand_on_each_other():
    rooms = [
        {"grid"},
        {"scales", "train_command"},
        {"runner"},
        {"analysis"},
        {"study"},
        {"studies", "study_report"},
        {"run_study"},
        {"demo"},
        {"all_studies"},
    ]
    floors = {room: number for number, on_floor in enumerate(rooms) for room in on_floor}
    upward = []
    for path in (PACKAGE / "study").rglob("*.py"):
        room = path.relative_to(PACKAGE / "study").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if parts[:2] == ["tinyexperts", "study"]:
                other = parts[2] if len(parts) > 2 else ""
                if other != room and floors.get(other, 9) >= floors[room]:
                    upward.append(f"{path.relative_to(PACKAGE)} imports {other or 'study'}")
    assert upward == []


def test_an_upward_and_a_sideways_import_are_seen():
    files = {
        "ops/a.py": "def f():\n    from tinyexperts.layers import PEER",
        "model/b.py": "from tinyexperts import data",
        "training/c.py": "import tinyexperts.cli",
        "study/d.py": "from tinyexperts.training import train",
    }
    assert upward_imports(files) == ["ops/a.py imports layers", "model/b.py imports data", "training/c.py imports cli"]


def test_no_pickle_is_read():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "allow_pickle=True" not in text
        assert "import pickle" not in text
        assert "torch.load(" not in text


def test_public_names():
    assert {"PEER", "ProductKeyMemory", "ExpertChoiceMoE", "DenseFFN"} <= set(tinyexperts.__all__)
    assert all(hasattr(tinyexperts, name) for name in tinyexperts.__all__)
