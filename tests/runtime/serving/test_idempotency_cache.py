import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.serving.infer_service import IdempotencyCache, digest_of
from edgeclip.runtime.serving.limits import HttpError

ONE, TWO = {"x": np.ones(2, np.float32)}, {"x": np.zeros(2, np.float32)}


class Work:
    """Counts its runs; waits until `gate` is set."""

    def __init__(self) -> None:
        self.runs = 0
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> dict[str, NDArray[Any]]:
        self.runs += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {"y": np.full(4, self.runs, np.float32)}


def test_a_request_that_comes_again_is_not_run_again() -> None:
    async def go() -> None:
        cache, work = IdempotencyCache(), Work()
        first = asyncio.create_task(cache.run_once("m", "k", ONE, work))
        again = asyncio.create_task(cache.run_once("m", "k", ONE, work))
        await asyncio.sleep(0)
        first.cancel()  # its client is gone; the run goes on for the other
        work.gate.set()
        later = await cache.run_once("m", "k", ONE, work)
        np.testing.assert_array_equal((await again)["y"], later["y"])
        assert work.runs == 1
        await cache.run_once("other model", "k", ONE, work)
        await cache.run_once("m", "other key", ONE, work)
        assert work.runs == 3

    asyncio.run(go())


def test_a_key_is_for_one_request() -> None:
    async def go() -> None:
        cache, work = IdempotencyCache(), Work()
        work.gate.set()
        await cache.run_once("m", "k", ONE, work)
        with pytest.raises(HttpError, match="used for another request") as found:
            await cache.run_once("m", "k", TWO, work)
        assert found.value.status == 409

    asyncio.run(go())


def test_what_failed_may_be_tried_again() -> None:
    async def go() -> None:
        cache, work = IdempotencyCache(), Work()
        work.gate.set()
        work.error = RuntimeError("busy")
        with pytest.raises(RuntimeError):
            await cache.run_once("m", "k", ONE, work)
        work.error = None
        assert (await cache.run_once("m", "k", ONE, work))["y"][0] == 2

    asyncio.run(go())


@pytest.mark.parametrize("bounds", [{"max_entries": 3}, {"max_bytes": 3 * 16}])
def test_the_oldest_is_forgotten(bounds: dict[str, int]) -> None:
    async def go() -> None:
        cache, work = IdempotencyCache(**bounds), Work()
        work.gate.set()
        for number in range(5):
            await cache.run_once("m", str(number), ONE, work)
        assert work.runs == 5
        await cache.run_once("m", "4", ONE, work)
        await cache.run_once("m", "2", ONE, work)
        assert work.runs == 5
        await cache.run_once("m", "1", ONE, work)
        assert work.runs == 6

    asyncio.run(go())


def test_the_digest_knows_names_types_shapes_and_values() -> None:
    texts = np.array([b"ab", b"c"], dtype=object)
    different: list[dict[str, NDArray[Any]]] = [
        {"x": np.zeros(4, np.float32)},
        {"y": np.zeros(4, np.float32)},
        {"x": np.zeros(4, np.int32)},
        {"x": np.zeros((2, 2), np.float32)},
        {"x": np.ones(4, np.float32)},
        {"x": texts},
        {"x": np.array([b"a", b"bc"], dtype=object)},
    ]
    assert len({digest_of(item) for item in different}) == len(different)
    assert digest_of({"x": texts}) == digest_of({"x": texts.copy()})
