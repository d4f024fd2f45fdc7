"""What a notebook's code is and reaches, from syntax trees: comments, space, prose and docstrings don't count."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError

ACROSS = "06"  # the notebook that compares the points of a study; a run of one setting does not have it
PARAMETERS = {"profile": str, "overrides": dict}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def notebook_tree(path: Path) -> ast.Module:
    """Parse a notebook's code cells as one module.

    Returns:
        The syntax tree of all code cells but the parameters cell.

    Raises:
        LwaError: unless exactly one cell is tagged `parameters` and it assigns profile (str), overrides (dict) and, in
            the notebook that compares points, study (str).
    """
    return _notebook_tree(path, _read(path))


@cache
def _notebook_tree(path: Path, text: str) -> ast.Module:
    """Parse a notebook whose file holds this text: once, though several profiles ask."""
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    except ValueError as error:
        raise LwaError(f"{path} is not a readable notebook: {error}") from None
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise LwaError(f"{path} has {len(tagged)} cells tagged `parameters`: it needs exactly one")
    _check_parameters(path, _parse(path, tagged[0]))
    return ast.Module([node for cell in cells if cell is not tagged[0] for node in _parse(path, cell).body], [])


def _check_parameters(path: Path, tree: ast.Module) -> None:
    """Compare the parameters cell with what the runner sets."""
    try:
        found = dict(_assignment(node) for node in tree.body)
    except ValueError:
        raise LwaError(
            f"{path}: its parameters cell may hold nothing but `name = value` lines with plain values"
        ) from None
    wanted = PARAMETERS | ({"study": str} if path.name.startswith(ACROSS) else {})
    if set(found) != set(wanted):
        raise LwaError(f"{path}: its parameters cell sets {sorted(found)}, but must set {sorted(wanted)}")
    for name, kind in wanted.items():
        if not isinstance(found[name], kind):
            raise LwaError(f"{path}: parameter {name} = {found[name]!r} must be of type {kind.__name__}")


def _assignment(node: ast.stmt) -> tuple[str, Any]:
    """The name and the plain value of an assignment; ValueError for any other statement."""
    if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
        raise ValueError(f"line {node.lineno} is not an assignment to a name")
    return node.targets[0].id, ast.literal_eval(node.value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LwaError(f"{path} is not a readable notebook: {error}") from None


def _parse(path: Path, cell: dict) -> ast.Module:
    """Parse one cell; IPython's own syntax (%magic, !shell) is translated first where there is any."""
    source = "".join(cell["source"])
    try:
        return ast.parse(source)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager
    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError as error:
        raise LwaError(f"{path}: a cell is not Python: {error}") from None


@cache
def _nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes of a syntax tree, from which docstrings are taken out first; walked once for all who ask."""
    found = [tree]
    for node in found:  # which grows on the way
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        found += ast.iter_child_nodes(node)
    return found


@cache
def digest(tree: ast.AST) -> str:
    """Hash a syntax tree without its docstrings."""
    _nodes(tree)
    return files.sha256_of_text(ast.dump(tree))


def reached(tree: ast.Module) -> dict[str, Path]:
    """All modules of lwa_helpers that a tree imports, directly or through others, wherever the import stands."""
    found: dict[str, Path] = {}
    queue, seen = sorted(_imports(tree, "")), {"lwa_helpers"}
    while queue:
        module = queue.pop()
        path = None if module in seen else _file_of(module)
        seen.add(module)
        if path is None:
            continue
        found[module] = path
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        queue += [module.rpartition(".")[0], *sorted(_imports(module_tree(path), package))]
    return dict(sorted(found.items()))


@cache
def module_tree(path: Path) -> ast.Module:
    """Parse one of the package's files."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def _imports(tree: ast.Module, package: str) -> set[str]:
    """Names of lwa_helpers modules that a tree imports; `package` is where relative imports start."""
    names: set[str] = set()
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            if any(alias.name == "lwa_helpers" for alias in node.names):
                names |= set(_public_names().values())
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            names |= {base} | {_home(base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return {name for name in names if name.split(".")[0] == "lwa_helpers"}


def _home(base: str, name: str) -> str:
    """The module that `from base import name` loads, if it is one; a public name is looked up in the lazy table."""
    return _public_names().get(name, f"{base}.{name}") if base == "lwa_helpers" else f"{base}.{name}"


@cache
def _public_names() -> dict[str, str]:
    """The lazy table of lwa_helpers/__init__.py: public name -> module."""
    tree = module_tree(paths.PACKAGE / "__init__.py")
    tables = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME"
    ]
    return {name: f"lwa_helpers.{home}" for name, home in ast.literal_eval(tables[0]).items()}


def _file_of(module: str) -> Path | None:
    """The file of a module of this package, or None when the name is not a module."""
    place = paths.PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


@cache
def constants(tree: ast.Module) -> frozenset:
    """Every plain value that a tree writes out."""
    return frozenset(node.value for node in _nodes(tree) if isinstance(node, ast.Constant))


def outputs_read(tree: ast.Module) -> set[str]:
    """The outputs that a notebook reads, as `run.input("models/teacher")` or `run.load_frame("ranks")` name them."""
    found = set()
    for call in _nodes(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
            name = call.args[0]
            if call.func.attr in ("input", "load_frame", "load_json") and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def sections_used(tree: ast.Module, sections: set[str]) -> set[str]:
    """The settings that a notebook reads as `run.config.<section>`; all if it hands run or run.config on whole."""
    parents = {child: node for node in _nodes(tree) for child in ast.iter_child_nodes(node)}
    runs = _assigned(tree, lambda value: isinstance(value, ast.Call) and ast.unparse(value.func).endswith("Run.open"))
    configs = _assigned(tree, lambda value: ast.unparse(value) in {f"{run}.config" for run in runs})
    used = set()
    for node in _nodes(tree):
        if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in runs | configs):
            continue
        parent = parents[node]
        if node.id in runs and isinstance(parent, ast.Attribute):
            if parent.attr != "config":
                continue
            node, parent = parent, parents[parent]
            if isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name):
                continue
        if not (isinstance(parent, ast.Attribute) and parent.attr in sections):
            return sections
        used.add(parent.attr)
    return used if runs else sections


def _assigned(tree: ast.Module, wanted: Callable[[ast.expr], bool]) -> set[str]:
    """Names that are assigned a value for which `wanted` holds."""
    nodes = [node for node in _nodes(tree) if isinstance(node, ast.Assign) and wanted(node.value)]
    return {target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)}
