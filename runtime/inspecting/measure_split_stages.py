"""Where the time of an answer goes when a server has a part in it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inspecting.measure_stages import Clock, measure_stages, read_file
from edgeclip.runtime.load_image import load_picture
from edgeclip.runtime.measuring.measurement import StageName, StageTime
from edgeclip.runtime.measuring.timing_statistics import percentile_interval
from edgeclip.runtime.preprocess import crop_batch

if TYPE_CHECKING:
    from edgeclip.runtime.split.http_client import Transfer
    from edgeclip.runtime.split.split_runtime import SplitRuntime


def measure_split_stages(
    runtime: "SplitRuntime",
    transfers: "list[Transfer]",
    pictures: Sequence[Path],
    *,
    runs: int = 50,
    deadline_ms: float = 10_000.0,
    clock: Clock = time.perf_counter,
) -> tuple[StageTime, ...]:
    """Time the stages of `SplitRuntime.encode_image`; medians over rounds, in milliseconds.

    - read, decode, resize: as in `explain_whole`. With a plan of kind "image" the last two are
      not told apart from what follows: a small file is sent as it is.
    - run: the head of a cut tower, and the encoding of what crosses the cut.
    - copy: with a plan of kind "image", what is sent being made.
    - network: the exchange, from the request to its reply, the server's queue and work included.

    What the device does beside the exchange is the whole less the exchange, so that the stages
    add up to the whole. Plans of kind "device" and "embedding" embed pictures on the device.

    Args:
        runtime: what is measured.
        transfers: the list that the runtime's `Server` tells (`watch=transfers.append`).
        pictures: image files, taken in turns.
        runs: rounds, at least 1; one before them is not counted.
        deadline_ms: of each call, ample: a call that the device had to answer is an error.
        clock: seconds.

    Raises:
        InputError: no pictures, `runs` below 1, a file that cannot be read, or a picture for
            which the server did not answer.
        EngineError: see `Encoder.encode_image`.
    """
    if runtime.plan.kind in ("device", "embedding"):
        return measure_stages(runtime.encoder, pictures, runs=runs)
    if not pictures or runs < 1:
        raise InputError("stages need at least one image file and one run")
    rounds = []
    for number in range(-1, runs):
        path = pictures[number % len(pictures)]
        here = _device_stages(runtime, path, clock)
        transfers.clear()
        began = clock()
        reply = runtime.encode_image([path], deadline_ms=deadline_ms)
        whole = 1e3 * (clock() - began)
        if reply.source != "server" or not transfers:
            raise InputError(
                f"the server did not answer for {path} ({reply.degraded or 'nothing was sent'}): "
                "measure with a server that works, whose `watch` adds to `transfers`"
            )
        network = transfers[0].ms
        rest: StageName = "run" if runtime.plan.kind == "cut" else "copy"
        rounds.append({**here, rest: whole - network - sum(here.values()), "network": network})
    return tuple(
        StageTime(name=name, ms=percentile_interval(np.array([r[name] for r in rounds[1:]]), 50))
        for name in rounds[0]
    )


def _device_stages(runtime: "SplitRuntime", path: Path, clock: Clock) -> dict[StageName, float]:
    """What the device does to a picture before a head runs, in milliseconds."""
    spec = runtime.encoder.spec.image
    times = [clock()]
    content = read_file(path)
    times.append(clock())
    if runtime.plan.kind == "cut":
        picture = load_picture(content, min_side=spec.resize)
        times.append(clock())
        crop_batch([picture.image], spec)
        times.append(clock())
    names: tuple[StageName, ...] = ("read", "decode", "resize")
    return {name: 1e3 * float(ms) for name, ms in zip(names, np.diff(times), strict=False)}
