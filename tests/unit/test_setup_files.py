"""Each version and package is named once: pyproject.toml, constraints.txt, environment.yml, embedded.txt, Makefile."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lwa_helpers.assets import EMBEDDED
from lwa_helpers.paths import ROOT


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [
        Requirement(line.split(" --hash")[0]) for line in lines if line.strip() and not line.startswith(("#", "--"))
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.fixture(scope="module")
def constraints() -> dict[str, Requirement]:
    return requirements((ROOT / "constraints.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def direct() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return requirements(
        project["dependencies"] + project["optional-dependencies"]["test"] + project["optional-dependencies"]["lint"]
    )


def test_every_constraint_is_one_exact_version(constraints: dict[str, Requirement]) -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(requirement.specifier)) for requirement in constraints.values())
    assert str(constraints["torch"].specifier) == "==2.13.0"


def test_each_direct_dependency_is_pinned_within_its_range(direct, constraints) -> None:
    assert len(direct) > 20
    for name, requirement in direct.items():
        pin = str(constraints[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(pin), f"{requirement} excludes the pinned {pin}"


def test_conda_takes_versions_and_packages_from_the_files_that_pip_does() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert {"--constraint constraints.txt", "--editable .[test,lint]"} <= set(pip)
    assert not [line for line in pip if "==" in line]
    assert "python=3.11" in environment["dependencies"]


def test_the_installed_versions_are_the_pinned_ones(direct, constraints) -> None:
    for name in (
        name for name, requirement in direct.items() if not requirement.marker or requirement.marker.evaluate()
    ):
        assert version(name).split("+")[0] == str(constraints[name].specifier).removeprefix("==")


def test_embedded_packages_are_pinned_by_hash_and_kept_out_of_the_constraints(constraints) -> None:
    lines = [line for line in (ROOT / "embedded.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    packages = requirements(lines)
    assert not packages.keys() & constraints.keys()
    for entry in EMBEDDED.values():
        requirement = Requirement(entry.requirement)
        assert packages[canonicalize_name(requirement.name)].specifier == requirement.specifier
        modules = {canonicalize_name(module) for module, _ in entry.parts}
        assert modules <= packages.keys()


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    done = subprocess.run(["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == targets


def test_make_paper_without_latexmk_names_the_packages(tmp_path) -> None:
    (tmp_path / "make").symlink_to(shutil.which("make"))
    (tmp_path / "sh").symlink_to("/bin/sh")
    done = subprocess.run(
        [tmp_path / "make", "-C", ROOT, "paper"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "apt-get install latexmk texlive-publishers" in done.stderr


def test_tex_packages_are_named_in_the_makefile_alone() -> None:
    assert "texlive" not in (ROOT / ".ci/run").read_text()
