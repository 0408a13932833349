"""The shape of the code: who may import whom, and what inspecting must never pay for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "normdoctor"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own floor's folder-mates below and from lower floors only.
FLOORS = [
    {"errors", "moments"},
    {"compared", "measured", "places"},
    {"layers"},
    {"findings", "flow"},
    {"readers", "rules", "writing"},
    {"models"},
    {"exporting", "torchscript", "tracing"},
    {"data", "looking", "placing", "processes", "programs"},
    {"comparing", "measurement"},
    {"selection"},
    {"inspection"},
    {"baseline", "comparison", "configuration"},
    {"recalibration", "folding"},
    {"reports"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR_OF = {name: place for place, floor in enumerate(FLOORS) for name in floor}

# Which folders may use each other although they share a floor: none but these.
SIDEWAYS = {("writing", "readers")}

HEAVY = {"torch": "with_torch.py", "onnxruntime": "with_onnx.py", "onnxscript": "with_onnx.py"}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Each imported module's full name, and whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    for name, _ in imports(path):
        if not name.startswith("normdoctor."):
            continue
        other = name.split(".")[1]
        if other == own or other.startswith("__") or other not in FLOOR_OF:
            continue
        lower = FLOOR_OF[other] < FLOOR_OF[own] or (own, other) in SIDEWAYS
        assert lower, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_files(path: Path) -> None:
    for name, _ in imports(path):
        package = name.split(".")[0]
        if package in HEAVY:
            assert path.name == HEAVY[package], f"{path.name} imports {name}"
        if name.split(".")[-1] in ("with_torch", "with_onnx"):
            assert (name, False) in imports(path), f"{path.name} imports {name} when it is imported"


def test_no_folder_in_a_folder() -> None:
    assert all(len(path.relative_to(PACKAGE).parts) <= 2 for path in MODULES)


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in MODULES} == set(FLOOR_OF)


INSPECTS = """
import sys
from normdoctor.cli import app
for arguments in {runs}:
    try:
        app(arguments)
    except SystemExit as stop:
        assert stop.code in (0, 1), (arguments, stop.code)
print([name for name in {packages} if name in sys.modules])
"""


def loaded_after(runs: list[list[str]], packages: list[str]) -> str:
    script = INSPECTS.format(runs=runs, packages=packages)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_torch_formats_import_neither_torch_nor_onnx(tmp_path: Path) -> None:
    out = str(tmp_path / "fixed.pt")
    runs = [
        ["inspect", "fixtures/slow_momentum_module.pt"],
        ["inspect", "fixtures/healthy.safetensors", "--format", "json"],
        ["rules"],
        ["explain", "S104"],
        ["--help"],
        ["recalibrate", "fixtures/slow_momentum_module.pt", "--method", "debias", "-o", out],
    ]
    assert loaded_after(runs, ["torch", "onnx", "onnxruntime", "onnxscript"]) == "[]"


def test_onnx_files_import_neither_torch_nor_a_runtime(tmp_path: Path) -> None:
    out = str(tmp_path / "fixed.onnx")
    runs = [
        ["inspect", "fixtures/healthy.onnx"],
        ["recalibrate", "fixtures/slow_momentum.onnx", "--method", "debias", "--updates", "216", "-o", out],
    ]
    assert loaded_after(runs, ["torch", "onnxruntime", "onnxscript"]) == "[]"


def test_what_the_graph_costs() -> None:
    """onnx only for the graph of an ONNX file, and torch for none that a file has."""
    runs = [["inspect", "fixtures/healthy.onnx", "--quick"], ["inspect", "fixtures/healthy.onnx", "--select", "S"]]
    assert loaded_after(runs, ["onnx"]) == "[]"
    assert loaded_after([["inspect", "fixtures/healthy.pt2"]], ["torch", "onnx"]) == "[]"


def test_help_does_not_import_numpy() -> None:
    assert loaded_after([["--help"], ["inspect", "--help"]], ["numpy", "torch", "onnx"]) == "[]"
