"""What a server serves, and what it checks before a model sees a request."""

import numpy as np
import pytest

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.models import (
    FunctionModel,
    Registry,
    TensorSpec,
    check_inputs,
    take_top,
    without_columns,
)
from edgeclip.runtime.wire.messages import Parameter, WireError
from tests.echo_function import echo
from tests.runtime.serving.odd_models import GatedModel, rows


class TwoInputs(GatedModel):
    inputs = (
        TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),
        TensorSpec(name="t", datatype="BYTES", shape=(-1,)),
    )


class AnyInputs(GatedModel):
    inputs: tuple[TensorSpec, ...] = ()


def test_models_are_found_by_name() -> None:
    registry = Registry()
    model = GatedModel()
    registry.add(FunctionModel(echo, "echo"))
    registry.add(model, joins=False)
    assert registry.names == ("echo", "gated")
    found = registry.get("gated")
    assert found is not None
    assert (found.model, found.joins) == (model, False)
    assert registry.get("other") is None


@pytest.mark.parametrize("name", ["", "a/b", "a b", ".", "-x", "é", "x" * 200])
def test_names_that_cannot_stand_in_an_address_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a model"):
        Registry().add(GatedModel(name))


def test_a_name_is_given_once() -> None:
    registry = Registry()
    registry.add(GatedModel())
    with pytest.raises(InputError, match="two models are called 'gated'"):
        registry.add(GatedModel())


def test_rows_are_counted() -> None:
    assert check_inputs(GatedModel(), rows(1, 2, 3)) == 3
    assert check_inputs(AnyInputs(), {"a": np.zeros(2), "b": np.zeros((5, 1))}) == 5
    assert check_inputs(AnyInputs(), {"a": np.zeros(())}) == 1
    assert check_inputs(AnyInputs(), {}) == 1


def test_a_column_is_taken_for_rows_where_rows_are_declared() -> None:
    """As clients send them that give every input an axis for the batch."""

    class Flat(AnyInputs):
        inputs = (TensorSpec(name="texts", datatype="BYTES", shape=(-1,)),)

    column = np.array([[b"a"], [b"b"]], object)
    assert without_columns(Flat(), {"texts": column})["texts"].tolist() == [b"a", b"b"]
    wide = np.array([[b"a", b"b"]], object)
    assert without_columns(Flat(), {"texts": wide})["texts"].shape == (1, 2)
    assert without_columns(AnyInputs(), {"a": column})["a"].shape == (2, 1)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "takes the inputs 'x', not none"),
        ({"x": np.zeros((1, 2), np.float32), "y": np.zeros(1)}, "not 'x', 'y'"),
        ({"x": np.zeros((1, 2))}, r"is FP32 \[-1, 2\].*not FP64 \[1, 2\]"),
        ({"x": np.zeros((1, 3), np.float32)}, r"not FP32 \[1, 3\]"),
        ({"x": np.zeros(2, np.float32)}, r"not FP32 \[2\]"),
        ({"x": np.zeros((0, 2), np.float32)}, "no rows"),
    ],
)
def test_other_inputs_are_refused(inputs: Tensors, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_inputs(GatedModel(), inputs)


def test_inputs_of_different_length_are_refused() -> None:
    inputs = {**rows(1, 2), "t": np.array([b"a"], object)}
    with pytest.raises(InputError, match=r"different numbers of rows: \[1, 2\]"):
        check_inputs(TwoInputs(), inputs)


@pytest.mark.parametrize(("given", "found"), [(None, 5), (3, 3), (3.0, 3), (99, 7)])
def test_top_has_a_default_and_a_bound(given: Parameter | None, found: int) -> None:
    assert take_top({} if given is None else {"top": given}, 5, 7) == found


@pytest.mark.parametrize("given", [0, -1, 1.5, "3", True])
def test_top_is_a_whole_number_above_0(given: Parameter) -> None:
    with pytest.raises((InputError, WireError), match="top"):
        take_top({"top": given}, 5, 7)
