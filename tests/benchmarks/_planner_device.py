"""The device of the planner's benchmark: this machine, acting slower than it is.

On one machine device and server would be equally fast, and no plan would ever send anything. So
the device does each of its stages several times over: its times are real, and so many times as
long.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgeclip.profiles.cuts.measure_cuts import TimedStage
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.planning.cut_set import CutHead, CutSet
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.codec import codec_name, encode, encode_picture
from edgeclip.runtime.wire.messages import BUNDLE, CODEC, CUT, SPACE_ID, InferRequest

T = TypeVar("T")

ONE_THREAD = dataclasses.replace(load_device("this-machine"), threads=1)
TIMES_SLOWER = 20
_DEADLINE_MS = 60_000.0


def slowly(run: Callable[[], T]) -> T:
    """Do something as often as the device is slower."""
    for _ in range(TIMES_SLOWER - 1):
        run()
    return run()


def slower(work: TimedStage) -> TimedStage:
    """A stage as this device would need for it."""
    return TimedStage(work.stage, lambda at: slowly(lambda: work.run(at)))


@dataclass(frozen=True, slots=True)
class Device:
    """Runs plans.

    Attributes:
        cuts: the tower.
        whole: all of it.
        heads: by the number of their cut.
        server: who is asked.
        pictures: contents of image files.
    """

    cuts: CutSet
    whole: CutTail
    heads: dict[int, CutHead]
    server: Server
    pictures: tuple[bytes, ...]

    @classmethod
    def of(cls, cuts: CutSet, server: Server) -> "Device":
        """Load the halves of all cuts."""
        return cls(
            cuts,
            CutTail(cuts, 0, ONE_THREAD),
            {number: CutHead(cuts, number, ONE_THREAD) for number in cuts.numbers},
            server,
            tuple(Path(path).read_bytes() for path in cuts.pictures),
        )

    def embed(self, plan: SplitPlan, at: int) -> np.ndarray[Any, Any]:
        """Embed picture `at` as a plan says; float32 [1, dim]."""
        picture, spec = self.pictures[at % len(self.pictures)], self.cuts.manifest.image
        if plan.kind == "image":
            codec = str(plan.codec)
            sent = slowly(lambda: encode_picture(codec, picture, spec))
            return self._ask(plan, {"images": np.array([sent], dtype=object)}, {})
        pixels = slowly(lambda: resize_and_crop(picture, spec))[None]
        if plan.kind == "device":
            return slowly(lambda: self.whole.embed(pixels))
        head, codec = self.heads[plan.cut or 0], codec_name(plan.codec)
        values = slowly(lambda: head.run(pixels)) if plan.cut else pixels
        tensors = slowly(lambda: encode(codec, values, axis=head.point.axis))
        return self._ask(plan, tensors, {CODEC: codec, CUT: str(plan.cut)})

    def echo(self, size: int) -> float:
        """Milliseconds of a request that the server does nothing about."""
        data = np.zeros((1, size), np.uint8)
        request = InferRequest(model="echo", inputs={"data": data})
        began = time.perf_counter()
        self.server.infer(request, Deadline.after_ms(_DEADLINE_MS))
        return 1e3 * (time.perf_counter() - began)

    def _ask(
        self, plan: SplitPlan, inputs: dict[str, Any], more: dict[str, str]
    ) -> np.ndarray[Any, Any]:
        manifest = self.cuts.manifest
        parameters = {SPACE_ID: manifest.space, BUNDLE: manifest.bundle, **more}
        request = InferRequest(model=str(plan.model), inputs=inputs, parameters=parameters)
        response = self.server.infer(request, Deadline.after_ms(_DEADLINE_MS))
        return response.outputs["image_embeds"]
