"""The shape of the house: rooms, small files, names that mean one thing. What ruff and import-linter cannot see."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import lwa_helpers
from lwa_helpers.paths import PACKAGE, ROOT

TESTS = ROOT / "tests"
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
LONGEST_FILE, LONGEST_CELL = 400, 25  # lines
PUBLIC = {
    "BaseRecommender", "Recommendation", "FisherInformationCalculator", "FisherResult", "LayerwiseDistillation",
    "DistillationTrainer", "load_amazon", "load_movielens", "Interactions", "load_teacher", "build_student",
}  # fmt: skip


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_the_folder_listing_is_the_street() -> None:
    assert {
        "data", "models", "fisher", "ranking", "distillation", "evaluation", "teachers", "report", "pipeline",
    } == ROOMS  # fmt: skip
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "assets", "cli", "config", "errors", "files", "paths", "recommender"}


def test_public_names_are_where_users_import_them_from() -> None:
    assert set(lwa_helpers.__all__) == PUBLIC
    assert all(getattr(lwa_helpers, name).__doc__ for name in PUBLIC)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_init_of_a_room_holds_a_docstring_alone(room: str) -> None:
    (docstring,) = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


def test_no_file_is_longer_than_one_can_read_at_a_sitting() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files(PACKAGE, TESTS)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def test_no_code_cell_is_long() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert max("".join(cell["source"]).count("\n") + 1 for cell in cells) <= LONGEST_CELL, path.name


def test_no_test_module_imports_another() -> None:
    modules = {path.stem for path in python_files(TESTS) if path.stem.startswith("test_")}
    for path in python_files(TESTS):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not modules & {name.split(".")[0] for name in names}, path.name


def test_unit_tests_lie_in_the_room_of_what_they_test() -> None:
    folders = {path.name for path in (TESTS / "unit").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders == ROOMS | {"benchmarks"}


def test_a_class_or_alias_has_a_name_of_its_own() -> None:
    seen: dict[str, Path] = {}
    for path in python_files(PACKAGE):
        for node in ast.parse(path.read_text()).body:
            alias = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id
            name = node.name if isinstance(node, ast.ClassDef) else alias
            if name and name[0].isupper() and not name.isupper():
                assert seen.setdefault(name, path) == path, f"{name} is in {seen[name].name} and {path.name}"
