"""The arrows between the rooms point one way, and inference does not import what only training needs."""

import ast
import subprocess
import sys
from pathlib import Path

import diffusers_softrepa

ROOT = Path(diffusers_softrepa.__file__).parent

# Room -> the rooms it may import.
ARROWS: dict[str, set[str]] = {
    "quoting": set(),
    "fingerprints": set(),
    "hub_ids": set(),
    "other_adapters": set(),
    "files": {"quoting"},
    "families": {"compat"},
    "config": {"families", "files", "hub_ids", "quoting"},
    "compat": set(),
    "tokens": {"config"},
    "insertion": {"families"},
    "wrapping": set(),
    "branches": {"quoting"},
    "injection": {"branches", "families", "insertion", "tokens", "weights", "wrapping"},
    "adapter": {"branches", "config", "families", "injection", "tokens", "weights"},
    "card": {"config", "hub_ids", "quoting"},
    "hub_options": {"quoting"},
    "hub_errors": {"compat", "hub_options", "quoting"},
    "hub": {"card", "compat", "files", "hub_errors", "hub_options", "quoting"},
    "checkpoint": {"card", "config", "files", "hub", "other_adapters", "quoting"},
    "convert": {"checkpoint", "config", "families", "files", "hub", "quoting"},
    "denoisers": {"families", "quoting", "wrapping"},
    "pipeline": {
        "adapter",
        "branches",
        "card",
        "checkpoint",
        "config",
        "denoisers",
        "files",
        "hub",
        "hub_ids",
        "quoting",
        "weights",
    },
    "integration": {"adapter", "compat", "files", "methods", "pipeline", "quoting", "weights", "wrapping"},
    "methods": {"pipeline"},
    "noising": set(),
    "pairs": set(),
    "objectives": {"pairs"},
    "conditioning": {"compat", "denoisers", "families", "noising"},
    "editing": {"adapter", "conditioning", "noising", "pipeline", "quoting"},
    "evaluation": {
        "card",
        "checkpoint",
        "compat",
        "config",
        "denoisers",
        "files",
        "fingerprints",
        "hub",
        "pipeline",
        "quoting",
        "weights",
    },
    "commands": {
        "checkpoint",
        "compat",
        "conditioning",
        "config",
        "convert",
        "editing",
        "evaluation",
        "families",
        "files",
        "hub",
        "pipeline",
        "quoting",
        "training",
    },
    "__main__": set(),
    "weights": {"config", "quoting"},
    # Editing, evaluation and training only when they are asked for.
    "__init__": {"config", "editing", "evaluation", "families", "integration", "methods", "pipeline", "training"},
}


def rooms_imported(path: Path) -> set[str]:
    """Returns the rooms of this package that a file imports."""
    depth = len(path.relative_to(ROOT).parts)
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            imported |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return imported


def test_every_import_between_rooms_is_an_arrow():
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room != "training":
            assert rooms_imported(path) - {room} <= ARROWS[room], path


def test_importing_the_package_imports_neither_training_nor_evaluation_nor_datasets():
    unwanted = ("datasets", "diffusers_softrepa.training", "diffusers_softrepa.evaluation")
    code = f"import sys, diffusers_softrepa; sys.exit(any(name in sys.modules for name in {unwanted}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
