"""Examples in docstrings of public functions print the output that they show."""

import doctest
import importlib

import pytest

EXAMPLES = ["spairkit.detector.load", "spairkit.rendering.render", "spairkit.presence.presence_kl"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_prints_the_output_shown(name: str) -> None:
    module_name, function = name.rsplit(".", 1)
    module = importlib.import_module(module_name)
    tests = doctest.DocTestFinder(recurse=False).find(
        getattr(module, function), function, globs=dict(vars(module))
    )
    assert any(test.examples for test in tests), f"{name} has no example"
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
