import importlib
import pkgutil

import pytest

import edgeclip.runtime


@pytest.mark.parametrize("name", edgeclip.runtime.__all__)
def test_public_name_resolves_to_what_its_module_defines(name: str) -> None:
    value = getattr(edgeclip.runtime, name)
    assert getattr(importlib.import_module(value.__module__), name) is value
    assert name in dir(edgeclip.runtime)


def test_every_lazy_name_is_public_and_sorted() -> None:
    assert sorted(edgeclip.runtime._HOME) == edgeclip.runtime.__all__


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        edgeclip.runtime.Nonsense  # noqa: B018


def test_no_public_name_is_that_of_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(edgeclip.runtime.__path__)}
    assert modules.isdisjoint(edgeclip.runtime.__all__)
