"""Requests are gathered, and none pays for another's mistake, hurry or leave-taking."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.serving.batcher import Batcher, BatchItem, QueuedRequest, run_batch
from edgeclip.runtime.serving.limits import (
    BatchLimits,
    ClientGoneError,
    DeadlinePassedError,
    DrainingError,
    QueueFullError,
)
from edgeclip.runtime.serving.metrics import ServerMetrics
from edgeclip.runtime.serving.models import RegisteredModel, ServingModel
from edgeclip.runtime.wire.messages import Parameter
from tests.runtime.serving.odd_models import PATIENCE, GatedModel, rows

FAR = 3600.0  # seconds to a deadline that is never reached
Scenario = Callable[[Batcher], Awaitable[None]]


def run(scenario: Scenario, model: ServingModel, *, joins: bool = True, **limits: Any) -> None:
    """Let a scenario use the batcher of a model, and close it."""

    async def main() -> None:
        metrics = ServerMetrics().of(model.name)
        batcher = Batcher(RegisteredModel(model, joins), BatchLimits(**limits), metrics)
        try:
            await asyncio.wait_for(scenario(batcher), PATIENCE)
        finally:
            batcher.close()

    asyncio.run(main())


def submit(
    batcher: Batcher, *values: float, parameters: dict[str, Parameter] | None = None, **more: Any
) -> QueuedRequest:
    return batcher.submit(rows(*values), parameters or {}, rows=len(values), **more)


async def sums(*waiting: QueuedRequest) -> list[list[float]]:
    return [(await each.future)["sum"].tolist() for each in waiting]


async def begin(batcher: Batcher, model: GatedModel) -> QueuedRequest:
    """Start a run that does not end before the gate opens."""
    model.gate.clear()
    first = submit(batcher, 0)
    await asyncio.to_thread(model.began.wait, PATIENCE)
    return first


def test_what_comes_during_a_run_is_run_together() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        rest = [submit(batcher, 1), submit(batcher, 2, 3), submit(batcher, 4)]
        model.gate.set()
        assert await sums(first, *rest) == [[1], [2], [3, 4], [5]]
        assert model.batches == [1, 4]

    run(scenario, model)


def test_a_batch_has_its_bound_and_a_larger_request_is_run_alone() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        rest = [submit(batcher, 1), submit(batcher, 2), submit(batcher, *range(5))]
        rest.append(submit(batcher, 3))
        model.gate.set()
        await sums(first, *rest)
        assert model.batches == [1, 2, 5, 1]

    run(scenario, model, max_batch=3)


def test_requests_that_differ_are_run_apart() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        other: list[dict[str, Parameter]] = [{"top": 1}, {"top": True}, {"top": 1.0}, {"top": 1}]
        rest = [submit(batcher, value, parameters=each) for value, each in enumerate(other)]
        model.gate.set()
        assert await sums(first, *rest) == [[1], [1], [2], [3], [4]]
        assert model.batches == [1, 2, 1, 1]

    run(scenario, model)


def test_a_model_whose_rows_belong_together_runs_each_request_alone() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        rest = [submit(batcher, 1), submit(batcher, 2)]
        model.gate.set()
        await sums(first, *rest)
        assert model.batches == [1, 1, 1]

    run(scenario, model, joins=False)


@pytest.mark.parametrize(
    ("bad", "error"), [(np.nan, InputError), (-1, ZeroDivisionError), (-2, RuntimeError)]
)
def test_a_failure_is_that_of_one_request(bad: float, error: type[Exception]) -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        wrong, right = submit(batcher, bad), submit(batcher, 5)
        model.gate.set()
        with pytest.raises(error):
            await wrong.future
        assert await sums(first, right) == [[1], [6]]
        assert model.batches == [1, 2, 1, 1]
        assert await sums(submit(batcher, 7)) == [[8]]

    run(scenario, model)


def test_an_idle_model_waits_for_more_rows_until_the_batch_is_full() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        one = submit(batcher, 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert model.batches == []
        other = submit(batcher, 2)
        await sums(one, other)
        assert model.batches == [2]

    run(scenario, model, max_batch=2, max_wait_ms=1000 * FAR)


def test_an_idle_model_does_not_wait_past_a_deadline() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        patient = submit(batcher, 1)
        hurried = submit(batcher, 2, deadline=time.monotonic() + 0.3)
        assert await sums(patient) == [[2]]
        await asyncio.wait([hurried.future])  # on a busy machine it may be too late for this one

    run(scenario, model, max_batch=100, max_wait_ms=1000 * FAR)


def test_a_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        late = submit(batcher, 1, deadline=time.monotonic() + 0.05)
        with pytest.raises(DeadlinePassedError):
            await late.future
        assert not first.future.done()
        model.gate.set()
        await sums(first, submit(batcher, 2, deadline=time.monotonic() + FAR))
        assert model.batches == [1, 1]

    run(scenario, model)


def test_a_deadline_in_the_past_is_refused_at_once() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(DeadlinePassedError):
            submit(batcher, 1, deadline=time.monotonic())
        assert model.batches == []

    run(scenario, model)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        rest = [submit(batcher, 1), submit(batcher, 2)]
        with pytest.raises(QueueFullError) as found:
            submit(batcher, 3)
        assert 1 <= int(found.value.headers["retry-after"]) <= 60
        model.gate.set()
        assert await sums(first, *rest) == [[1], [2], [3]]
        assert await sums(submit(batcher, 4)) == [[5]]

    run(scenario, model, queue=2)


def test_one_who_leaves_makes_room_and_is_never_run() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        leaving = submit(batcher, 1)
        batcher.give_up(leaving, ClientGoneError())
        with pytest.raises(ClientGoneError):
            await leaving.future
        staying = submit(batcher, 2)
        batcher.give_up(first, ClientGoneError())  # it runs: too late
        model.gate.set()
        assert await sums(first, staying) == [[1], [3]]
        assert model.batches == [1, 1]

    run(scenario, model, queue=1)


def test_the_end_is_told_to_all_who_wait_or_run() -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        first = await begin(batcher, model)
        waiting = submit(batcher, 1)
        batcher.close()
        for each in (first, waiting):
            with pytest.raises(DrainingError):
                await each.future
        with pytest.raises(DrainingError):
            submit(batcher, 2)
        model.gate.set()

    run(scenario, model)


class WrongRows(GatedModel):
    """Gives one row, whatever it is given."""

    def run(self, inputs: Tensors, parameters: Any) -> dict[str, Any]:
        self.batches.append(len(inputs["x"]))
        return {"sum": np.zeros(1, np.float32)}


def test_rows_that_cannot_be_told_apart_are_not_guessed() -> None:
    model = WrongRows()
    shares = [BatchItem(rows(1), {}, 1), BatchItem(rows(2), {}, 1)]
    assert [answer["sum"].tolist() for answer in run_batch(model, shares)] == [[0], [0]]  # type: ignore[index]
    assert model.batches == [2, 1, 1]


@pytest.mark.parametrize("outputs", [None, [1], {"a": 1}, {1: np.zeros(1)}, {"a": np.array("t")}])
def test_outputs_that_cannot_be_sent_are_the_models_fault(outputs: Any) -> None:
    model = GatedModel()
    model.run = lambda inputs, parameters: outputs  # type: ignore[method-assign]
    (answer,) = run_batch(model, [BatchItem(rows(1), {}, 1)])
    assert isinstance(answer, EngineError)


def test_inputs_of_other_lengths_are_joined_with_nothing() -> None:
    inputs = {"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}
    assert BatchItem(inputs, {}, 3).key != BatchItem(inputs, {}, 3).key
    assert BatchItem(rows(1), {}, 1).key == BatchItem(rows(2, 3), {}, 2).key


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9) | st.just(np.nan), min_size=1, max_size=4),
            st.sampled_from([{}, {"top": 1}, {"top": 2}]),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 6),
)
def test_answers_do_not_depend_on_batch_mates(
    requests: list[tuple[list[float], dict[str, Parameter], bool]], max_batch: int
) -> None:
    model = GatedModel()

    async def scenario(batcher: Batcher) -> None:
        queued = []
        for values, parameters, pauses in requests:
            queued.append(submit(batcher, *values, parameters=parameters))
            if pauses:
                await asyncio.sleep(0)
        for (values, _, _), waiting in zip(requests, queued, strict=True):
            if np.isnan(values).any():
                with pytest.raises(InputError):
                    await waiting.future
            else:
                assert await sums(waiting) == [[value + 1 for value in values]]

    run(scenario, model, max_batch=max_batch)
