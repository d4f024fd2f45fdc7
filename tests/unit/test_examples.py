"""The example in the docstring of each public name runs and prints what it says."""

from __future__ import annotations

import doctest
import inspect

import pytest

import lwa_helpers


@pytest.mark.parametrize("name", lwa_helpers.__all__)
def test_the_example_of_a_public_name_runs(name: str, request: pytest.FixtureRequest) -> None:
    if name == "load_amazon":
        request.getfixturevalue("cache")  # others use the models that `make setup` converted
    thing = getattr(lwa_helpers, name)
    module = vars(inspect.getmodule(thing))
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs=dict(module))
    assert example.examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(example).failed == 0
