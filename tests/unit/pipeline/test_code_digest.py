"""What a notebook's code reaches and reads, worked out by hand."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiny_project import write_notebook

from lwa_helpers import paths
from lwa_helpers.pipeline import code_digest

SECTIONS = {"data", "fisher", "seed"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a lazy table, a subpackage, and every form of import."""
    files = {
        "__init__.py": '_HOME = {"Public": "one", "Other": "deep"}\n',
        "one.py": "from .two import x\n",
        "two.py": "def late():\n    from lwa_helpers import three\n",
        "three.py": "import numpy\n",
        "deep/__init__.py": "from lwa_helpers.deep.inner import y\n",
        "deep/inner.py": "from ..four import z\nfrom . import sibling\n",
        "deep/sibling.py": "",
        "four.py": "",
        "unreached.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    code_digest._public_names.cache_clear()
    yield tmp_path
    code_digest._public_names.cache_clear()


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from lwa_helpers import Public", {"one", "two", "three"}),
        ("from lwa_helpers.two import late", {"two", "three"}),
        ("def f():\n    import lwa_helpers.three", {"three"}),
        ("from lwa_helpers.deep.sibling import q", {"deep", "deep.inner", "deep.sibling", "four"}),
        ("from lwa_helpers import three as t, Other", {"three", "deep", "deep.inner", "deep.sibling", "four"}),
        ("import lwa_helpers", {"one", "two", "three", "deep", "deep.inner", "deep.sibling", "four"}),
        ("import numpy.linalg, other.lwa_helpers", set()),
        ("import_module('lwa_helpers.two')", {"two", "three"}),
        ("def f():\n    importlib.import_module('lwa_helpers.four').z", {"four"}),
        ("import_module(f'lwa_helpers.{name}')", set()),
    ],
)
def test_modules_are_followed_through_every_kind_of_import(package: Path, code: str, names: set[str]) -> None:
    assert set(code_digest.reached(ast.parse(code))) == {f"lwa_helpers.{name}" for name in names}


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("run = Run.open('a')\nf(run.config.data)", {"data"}),
        ("r = Run.open('a')\nc = r.config\nf(c.data.name, c.seed)\nr.finish()", {"data", "seed"}),
        ("run = Run.open('a')\nmodel.config.layers", set()),
        ("run = Run.open('a')\nf(run)", SECTIONS),
        ("run = Run.open('a')\nf(run.config)", SECTIONS),
        ("run = Run.open('a')\nc = run.config\nf(c)", SECTIONS),
        ("run = Run.open('a')\nrun.config.model_dump()", SECTIONS),
        ("g()", SECTIONS),
    ],
)
def test_settings_that_are_read(code: str, used: set[str]) -> None:
    assert code_digest.sections_used(ast.parse(code), SECTIONS) == used


def test_a_digest_sees_code_only() -> None:
    def digest(text: str) -> str:
        return code_digest.digest(ast.parse(text))

    plain = digest("def f(x):\n    return x + 1")
    assert digest('"""Module."""\ndef f( x ):  # note\n    """Doc."""\n\n    return x+1') == plain
    assert digest("def f(x):\n    return x + 2") != plain
    assert digest('def f(x):\n    return "x"') != digest('def f(x):\n    return "y"')


def test_magics_are_code_and_the_parameters_cell_is_not(tmp_path: Path) -> None:
    def digest(*cells: str, **more: str) -> str:
        return code_digest.digest(code_digest.notebook_tree(write_notebook(tmp_path / "n.ipynb", *cells, **more)))

    assert digest("%matplotlib inline", "x = 1") != digest("x = 1")
    assert digest("x = 1", parameters='profile = "quick"\noverrides = {}') == digest("x = 1")
    assert digest("x = 1", "y = 2") == digest("x = 1\ny = 2")


def test_a_notebook_is_parsed_again_only_when_its_file_has_changed(tmp_path: Path) -> None:
    first = code_digest.notebook_tree(write_notebook(tmp_path / "n.ipynb", "x = 1"))
    assert code_digest.notebook_tree(tmp_path / "n.ipynb") is first
    changed = code_digest.notebook_tree(write_notebook(tmp_path / "n.ipynb", "x = 2"))
    assert code_digest.digest(changed) != code_digest.digest(first)


def test_docstrings_are_not_among_the_values_that_a_module_writes_out() -> None:
    tree = ast.parse('"""a.yaml"""\nread("b.yaml")\ndef f():\n    """c.yaml"""\n    "d.yaml"')
    assert code_digest.constants(tree) == {"b.yaml", "d.yaml"}


@pytest.mark.parametrize(
    ("notebook", "module", "expected"),
    [
        ("01_data", "evaluation.sasrec", False),
        ("02_fisher_heatmaps", "evaluation.sasrec", True),
        ("02_fisher_heatmaps", "fisher.triton_kernels", True),  # loaded by import_module
        ("02_fisher_heatmaps", "fisher.calculator", True),
        ("03_weighting_ablation", "fisher.calculator", False),  # it loads a result
        ("04_distillation", "fisher.calculator", False),
        ("01_data", "pipeline.publish", False),
    ],
)
def test_a_notebook_is_stale_after_an_edit_of_what_it_uses_alone(notebook: str, module: str, expected: bool) -> None:
    tree = code_digest.notebook_tree(paths.NOTEBOOKS / f"{notebook}.ipynb")
    assert (f"lwa_helpers.{module}" in code_digest.reached(tree)) is expected
