"""SplitRuntime: an `Encoder` that sends work to a server as a plan says, and works without one."""

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import Hit, Index, check_space, one_thread_for_products
from edgeclip.runtime.bundle.labels import LabelSet
from edgeclip.runtime.encoder import Answer, Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import ImageInput
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.escalation import Escalation, SecondOpinion
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.remote_models import FarModel, Pictures, is_pictures, open_far_tower
from edgeclip.runtime.split.remote_with_fallback import (
    Call,
    DeviceTime,
    Outcome,
    Reply,
    ServerOrDevice,
    SplitTower,
    Work,
)
from edgeclip.runtime.split.resilience import Deadline

if TYPE_CHECKING:
    from edgeclip.runtime.planning.cut_set import CutSet

T = TypeVar("T")
Answers = list[tuple[Answer, ...]]
Hits = list[tuple[Hit, ...]]

DEFAULT_DEADLINE_MS = 1000.0
_LABELS = "-labels-"  # in the names of a server's label models


class SplitRuntime:
    """Embeds and answers like `Encoder`, with a server's help, by a deadline.

    What the server does is the plan's. If it does not answer, the device does the work itself,
    with the bundle's own towers, and the reply says so. The time that the device needs for that
    is measured and kept in reserve; where that is more than the deadline leaves, the server has
    all the time there is, and the device's answer comes late. Making a runtime loads and
    measures the tower that it would fall back to.

    Texts are embedded on the device whatever the plan. With a server, numpy's products are held
    to one thread each from then on, since calls come from several.

    Args:
        encoder: the bundle on the device alone.
        plan: who does what.
        server: who is asked; not needed for a plan of kind "device" without `escalation`.
        cuts: the cut set of the bundle, for a plan of kind "cut".
        escalation: ask a teacher where `classify` or `search` is unsure of a picture, for a plan
            of kind "device".

    Attributes:
        encoder: see above.
        plan: see above.

    Raises:
        SpaceMismatchError: bundle, plan and cuts are not of one embedding space.
        InputError: something that the plan needs is missing, or an unknown codec.
        BundleError, CutSetError, EngineError, MissingExtraError: a tower cannot be loaded.
    """

    def __init__(
        self,
        encoder: Encoder,
        plan: SplitPlan,
        server: Server | None = None,
        *,
        cuts: "CutSet | None" = None,
        escalation: Escalation | None = None,
    ) -> None:
        check_space(encoder.space, plan.space, f"the plan {plan.name!r}")
        if escalation is not None and plan.kind != "device":
            raise InputError("an escalation goes with a plan of kind 'device'")
        self.encoder, self.plan = encoder, plan
        self._time = DeviceTime()
        self._far: FarModel | None = None
        self._tower: SplitTower | None = None
        self._second: SecondOpinion | None = None
        if plan.kind == "device" and escalation is None:
            return
        if server is None:
            raise InputError(f"the plan {plan.name!r} needs a server: give its address")
        one_thread_for_products()
        self._chooser = ServerOrDevice(server, self._time)
        asked = FarModel.of(encoder, server, escalation.model if escalation else str(plan.model))
        if escalation is not None:
            self._second = SecondOpinion(escalation, encoder, asked, self._chooser)
        elif plan.kind == "embedding":
            self._far = asked
        else:
            far = open_far_tower(asked, plan, cuts, encoder.device)
            self._tower = SplitTower(encoder, far, self._chooser, self._time)

    def __enter__(self) -> "SplitRuntime":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait until all that was deferred is kept. The server's connections stay open."""
        if self._second is not None:
            self._second.close()

    def encode_image(
        self, images: ImageInput | Sequence[ImageInput], *, deadline_ms: float | None = None
    ) -> Reply[FloatArray]:
        """Embed one image or several; float32 [N, dim]. They are sent in one request.

        Args:
            images: see `Encoder.encode_image`.
            deadline_ms: when the answer must be there; the plan's by default, or 1 s.

        Raises:
            InputError: an image that cannot be read, or a deadline that is not above 0.
            EngineError: see `Encoder.encode_image`.
        """
        call = self._call(deadline_ms)
        return call.reply(self._embed(self._pictures(images), None, call.deadline))

    def encode_pixels(
        self, pixels: NDArray[np.uint8], *, deadline_ms: float | None = None
    ) -> Reply[FloatArray]:
        """Embed pictures that have their size already; see `Encoder.encode_pixels`."""
        call = self._call(deadline_ms)
        self.encoder.encode_pixels(pixels[:0])  # refuses another shape or dtype, runs nothing
        pictures = Pictures(pixels, self.encoder.spec.image, pixels)
        return call.reply(self._embed(pictures, None, call.deadline))

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        truncate: bool = False,
        deadline_ms: float | None = None,
    ) -> Reply[FloatArray]:
        """Embed texts on the device; see `Encoder.encode_text`."""
        call = self._call(deadline_ms)
        return call.reply(Outcome(self.encoder.encode_text(texts, truncate=truncate), "device"))

    def classify(
        self,
        images: ImageInput | Sequence[ImageInput],
        labels: LabelSet | Sequence[str] | None = None,
        *,
        top: int = 5,
        deadline_ms: float | None = None,
    ) -> Reply[Answers]:
        """Give each image its `top` labels, the most likely first; see `Encoder.classify`.

        With a plan of kind "embedding" for a label model, the server's labels answer, and
        `labels` are those to fall back to.

        Raises:
            SpaceMismatchError: the label set was made in another embedding space.
            InputError: no labels where there must be some, `top` below 1, or an image that
                cannot be read.
            ServerError: the server's labels were asked, and there are none to fall back to.
        """
        call, far = self._call(deadline_ms), self._far_model(of_labels=True)
        _check_top(top)
        if labels is None and far is None:
            raise InputError("no labels were given, and by this plan no server has them")
        baked = self._baked(labels)
        entries = None if baked is None else baked.embeddings
        found = self._embed(self._pictures(images), entries, call.deadline, "labels")
        outcome = self._answer(
            found,
            None if far is None else partial(far.classify, top=top),
            None
            if baked is None
            else partial(self.encoder.classify_embeddings, labels=baked, top=top),
            "labels",
            call.deadline,
        )
        return call.reply(outcome)

    def search(
        self,
        query: ImageInput | Sequence[str] | Sequence[ImageInput],
        index: Index | None = None,
        *,
        top: int = 10,
        deadline_ms: float | None = None,
    ) -> Reply[Hits]:
        """Give each query the `top` entries with the highest cosine; see `Encoder.search`.

        With a plan of kind "embedding" for an index, the server's index answers, and `index` is
        the one to fall back to.

        Raises:
            SpaceMismatchError: the index was made in another embedding space.
            InputError: no index where there must be one, `top` below 1, or a query that cannot
                be read.
            ServerError: the server's index was asked, and there is none to fall back to.
        """
        call, far = self._call(deadline_ms), self._far_model(of_labels=False)
        _check_top(top)
        if index is None and far is None:
            raise InputError("no index was given, and by this plan no server has it")
        if index is not None:
            index.check_space(self.encoder.space)
        if is_pictures(query):
            entries = None if index is None else index.embeddings
            found = self._embed(self._pictures(query), entries, call.deadline, "index")
        else:
            found = Outcome(self.encoder.embed_query(query), "device")
        ask = None if far is None else partial(far.search, top=top)
        here = None if index is None else partial(self.encoder.search, index=index, top=top)
        return call.reply(self._answer(found, ask, here, "index", call.deadline))

    def _call(self, deadline_ms: float | None) -> Call:
        if deadline_ms is None:
            deadline_ms = self.plan.deadline_ms or DEFAULT_DEADLINE_MS
        return Call.within_ms(deadline_ms)

    def _pictures(self, images: ImageInput | Sequence[ImageInput]) -> Pictures:
        return Pictures(images, self.encoder.spec.image)

    def _far_model(self, *, of_labels: bool) -> FarModel | None:
        """The model of an embedding plan, if it is of this kind."""
        far = self._far
        return far if far is not None and (_LABELS in far.name) is of_labels else None

    def _baked(self, labels: LabelSet | Sequence[str] | None) -> LabelSet | None:
        if labels is None:
            return None
        baked = labels if isinstance(labels, LabelSet) else self.encoder.bake_labels(labels)
        baked.check_space(self.encoder.space)
        return baked

    def _embed(
        self, pictures: Pictures, entries: FloatArray | None, deadline: Deadline, *then: Work
    ) -> Outcome[FloatArray]:
        """Embed pictures as planned; `entries` and `then` are what comes of the embeddings."""
        if self._second is not None and entries is not None:
            return self._second.embed(pictures, entries, deadline)
        if self._tower is not None and len(pictures):
            return self._tower.embed(pictures, deadline, *then)
        return Outcome(self.encoder.encode_pixels(pictures.pixels), "device")

    def _answer(
        self,
        embedded: Outcome[FloatArray],
        far: Callable[[FloatArray, Deadline], T] | None,
        here: Callable[[FloatArray], T] | None,
        work: Work,
        deadline: Deadline,
    ) -> Outcome[T]:
        """Hold embeddings against what the server has, or else against what the device has."""
        embeddings, count = embedded.value, len(embedded.value)
        if far is not None and here is None:
            return Outcome(far(embeddings, deadline), "server")
        if far is not None and here is not None and count:
            return self._chooser.run(
                partial(far, embeddings), partial(here, embeddings), (work,), count, deadline
            )
        assert here is not None
        with self._time.measured(work, count):
            return Outcome(here(embeddings), embedded.source, embedded.degraded)


def _check_top(top: int) -> None:
    if top < 1:
        raise InputError(f"top is {top}: ask for at least 1 answer")
