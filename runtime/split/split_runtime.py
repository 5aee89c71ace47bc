"""An `Encoder` that lets a server do part of the work, and does all of it if the server fails."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import (
    Hit,
    Index,
    LabelSet,
    check_space,
    limit_blas_to_one_thread,
)
from edgeclip.runtime.encoder import Encoder, LabelScore
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.inputs.images import ImageInput
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.split.escalation import Escalation, Escalator
from edgeclip.runtime.split.http_client import Server, Transfer
from edgeclip.runtime.split.remote_models import (
    ImageBatch,
    RemoteModel,
    is_image_query,
    is_label_model,
    open_remote_tower,
)
from edgeclip.runtime.split.remote_with_fallback import (
    DeviceTimes,
    DeviceWork,
    ImageTowerWithFallback,
    RemoteWithFallback,
    Reply,
    StepResult,
    measure_image_tower,
)
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.codec import FILE

if TYPE_CHECKING:
    from edgeclip.runtime.planning.cut_set import CutSet
    from edgeclip.runtime.planning.replanning import AdaptivePlan

_log = logging.getLogger(__name__)

T = TypeVar("T")
Answers = list[tuple[LabelScore, ...]]
Hits = list[tuple[Hit, ...]]

DEFAULT_DEADLINE_MS = 1000.0


@dataclass(frozen=True, slots=True)
class _Route:
    """What a plan needs: a tower for kinds "image" and "cut", a model for kind "embedding"."""

    plan: SplitPlan
    tower: ImageTowerWithFallback | None = None
    model: RemoteModel | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """A call in progress: its deadline, and its start by `time.perf_counter()`."""

    deadline: Deadline
    began: float

    def reply(self, result: StepResult[T]) -> Reply[T]:
        ms = (time.perf_counter() - self.began) * 1e3
        return Reply(value=result.value, source=result.source, degraded=result.degraded, ms=ms)


class SplitRuntime:
    """Embed, classify and search like `Encoder`, with a server's help, by a deadline.

    The plan says what the server does. If the server does not answer in time, the device does
    the work itself, with the bundle's own towers, and the reply says so. The time that the
    device needs for that is measured and reserved. If the device needs longer than the deadline,
    the server gets the whole deadline; if it then fails, the device's answer is late. The
    constructor loads and measures the tower to fall back to.

    With an `AdaptivePlan` the plan follows the link: every request to the server is an
    observation of the link, and the plan is reviewed after calls, on a background thread. A
    request that was given up at its deadline counts as an observation too.

    Texts are always embedded on the device. If the runtime uses a server, the constructor limits
    BLAS to one thread per product for the whole process, because calls come from several threads.

    Args:
        encoder: the bundle on the device alone.
        plan: what runs where; fixed, or adapted to the link.
        server: the server; not needed for a plan of kind "device" without `escalation`.
        cuts: the cut set of the bundle, for a plan of kind "cut" or an adaptive one.
        escalation: ask a teacher about the pictures that `classify` or `search` is unsure about;
            for a plan of kind "device".

    Attributes:
        encoder: the bundle on the device alone.

    Raises:
        SpaceMismatchError: bundle, plan and cuts are not of one embedding space.
        InputError: something that the plan needs is missing, or an unknown codec.
        CertificateError: the cascade of `escalation` is certified for texts.
        BundleError, CutSetError, EngineError, MissingExtraError: a tower cannot be loaded.
    """

    def __init__(
        self,
        encoder: Encoder,
        plan: "SplitPlan | AdaptivePlan",
        server: Server | None = None,
        *,
        cuts: "CutSet | None" = None,
        escalation: Escalation | None = None,
    ) -> None:
        adaptive = None if isinstance(plan, SplitPlan) else plan
        first = plan if isinstance(plan, SplitPlan) else plan.current
        check_space(encoder.space, first.space, f"the plan {first.name!r}")
        if escalation is not None and (adaptive is not None or first.kind != "device"):
            raise InputError("an escalation goes with a plan of kind 'device'")
        if adaptive is not None and cuts is None:
            raise InputError("an adaptive plan needs the cut set of the bundle")
        self.encoder = encoder
        self._server, self._cuts, self._adaptive = server, cuts, adaptive
        self._times = DeviceTimes()
        self._escalator: Escalator | None = None
        # Held while a review is submitted or runs: acquired by the thread of a call, released by
        # the pool's thread at the end of the review.
        self._review_lock = threading.Lock()
        self._review_pool: ThreadPoolExecutor | None = None
        if adaptive is None and escalation is None and first.kind == "device":
            self._route = _Route(first)
            return
        if server is None:
            raise InputError(f"the plan {first.name!r} needs a server: give its address")
        limit_blas_to_one_thread()
        self._fallback = RemoteWithFallback(server, self._times)
        if adaptive is not None or first.kind in ("image", "cut"):
            sends_files = adaptive is not None or first.codec == FILE
            measure_image_tower(encoder, self._times, with_file=sends_files)
        self._route = self._open_route(first, server)
        if escalation is not None:
            teacher = RemoteModel.of(encoder, server, escalation.model)
            self._escalator = Escalator(escalation, encoder, teacher, self._fallback)
        if adaptive is not None:
            self._review_pool = ThreadPoolExecutor(1, "edgeclip-replan")
            server.add_observer(partial(_observe, adaptive))

    @property
    def plan(self) -> SplitPlan:
        """The plan in use; an adaptive one may change between calls."""
        return self._route.plan

    def _open_route(self, plan: SplitPlan, server: Server) -> _Route:
        """Open what a plan needs on the server; for a cut, load the head."""
        if plan.kind == "device":
            return _Route(plan)
        model = RemoteModel.of(self.encoder, server, str(plan.model))
        if plan.kind == "embedding":
            return _Route(plan, model=model)
        remote = open_remote_tower(model, plan, self._cuts, self.encoder.device)
        return _Route(plan, tower=ImageTowerWithFallback(self.encoder, remote, self._fallback))

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
        """Wait until deferred escalations and the drift watch are stored.

        The server's connections stay open.
        """
        if self._escalator is not None:
            self._escalator.close()
        if self._review_pool is not None:
            self._review_pool.shutdown()

    def encode_image(
        self, images: ImageInput | Sequence[ImageInput], *, deadline_ms: float | None = None
    ) -> Reply[FloatArray]:
        """Embed one or several images in one request; float32 [N, dim].

        Args:
            images: see `Encoder.encode_image`.
            deadline_ms: milliseconds until the result is needed; by default the plan's, or 1 s.

        Raises:
            InputError: an image that cannot be read, or a deadline that is not above 0.
            EngineError: see `Encoder.encode_image`.
        """
        call = self._begin(deadline_ms)
        return call.reply(self._embed(self._batch(images), call.deadline))

    def encode_pixels(
        self, pixels: NDArray[np.uint8], *, deadline_ms: float | None = None
    ) -> Reply[FloatArray]:
        """Embed pictures that are resized already, uint8 [N, size, size, 3]; float32 [N, dim]."""
        call = self._begin(deadline_ms)
        self.encoder.encode_pixels(pixels[:0])  # refuses another shape or dtype, runs nothing
        images = ImageBatch(pixels, self.encoder.spec.image, pixels)
        return call.reply(self._embed(images, call.deadline))

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        truncate: bool = False,
        deadline_ms: float | None = None,
    ) -> Reply[FloatArray]:
        """Embed texts on the device; float32 [N, dim]. Arguments as for `Encoder.encode_text`."""
        call = self._begin(deadline_ms)
        return call.reply(StepResult(self.encoder.encode_text(texts, truncate=truncate), "device"))

    def classify(
        self,
        images: ImageInput | Sequence[ImageInput],
        labels: LabelSet | Sequence[str] | None = None,
        *,
        top: int = 5,
        deadline_ms: float | None = None,
    ) -> Reply[Answers]:
        """Return the `top` most likely labels of each image, as `Encoder.classify` does.

        With a plan of kind "embedding" for a label model, the server's labels are used, and
        `labels` are the fallback. Under a zero-shot certificate they are the certified ones by
        default.

        Raises:
            CertificateError: the cascade was not certified for this.
            SpaceMismatchError: the label set was made in another embedding space.
            InputError: no labels where there must be some, `top` below 1, or an image that
                cannot be read.
            ServerError: the server's labels could not be used, and there is no fallback.
        """
        call, remote = self._begin(deadline_ms), self._remote_model(of_labels=True)
        _check_top(top)
        if self._escalator is not None:
            batch = self._batch(images)
            return call.reply(self._escalator.classify(batch, labels, top, call.deadline))
        if labels is None and remote is None:
            raise InputError("no labels were given, and by this plan no server has them")
        label_set = self._label_set(labels)
        embedded = self._embed(self._batch(images), call.deadline, "labels")
        result = self._compare(
            embedded,
            None if remote is None else partial(remote.classify, top=top),
            None
            if label_set is None
            else partial(self.encoder.classify_embeddings, labels=label_set, top=top),
            "labels",
            call.deadline,
        )
        return call.reply(result)

    def search(
        self,
        query: ImageInput | Sequence[str] | Sequence[ImageInput],
        index: Index | None = None,
        *,
        top: int = 10,
        deadline_ms: float | None = None,
    ) -> Reply[Hits]:
        """Return the `top` entries nearest to each query, as `Encoder.search` does.

        With a plan of kind "embedding" for an index, the server's index is used, and `index` is
        the fallback.

        Raises:
            CertificateError: the cascade was not certified for this.
            SpaceMismatchError: the index was made in another embedding space.
            InputError: no index where there must be one, `top` below 1, or a query that cannot
                be read.
            ServerError: the server's index could not be used, and there is no fallback.
        """
        call, remote = self._begin(deadline_ms), self._remote_model(of_labels=False)
        _check_top(top)
        if index is None and remote is None:
            raise InputError("no index was given, and by this plan no server has it")
        if index is not None:
            index.check_space(self.encoder.space)
        if is_image_query(query):
            if self._escalator is not None and index is not None:
                batch = self._batch(query)
                return call.reply(self._escalator.search(batch, index, top, call.deadline))
            embedded = self._embed(self._batch(query), call.deadline, "index")
        else:
            if self._escalator is not None:
                self._escalator.check_search_by_text()
            embedded = StepResult(self.encoder.embed_query(query), "device")
        on_server = None if remote is None else partial(remote.search, top=top)
        local = None if index is None else partial(self.encoder.search, index=index, top=top)
        return call.reply(self._compare(embedded, on_server, local, "index", call.deadline))

    def _begin(self, deadline_ms: float | None) -> _Call:
        if deadline_ms is None:
            deadline_ms = self.plan.deadline_ms or DEFAULT_DEADLINE_MS
        return _Call(Deadline.after_ms(deadline_ms), time.perf_counter())

    def _batch(self, images: ImageInput | Sequence[ImageInput]) -> ImageBatch:
        return ImageBatch(images, self.encoder.spec.image)

    def _remote_model(self, *, of_labels: bool) -> RemoteModel | None:
        """Return the model that an embedding plan names, if it is of the requested kind."""
        model = self._route.model
        if model is None or is_label_model(model.name) != of_labels:
            return None
        return model

    def _label_set(self, labels: LabelSet | Sequence[str] | None) -> LabelSet | None:
        if labels is None:
            return None
        label_set = labels if isinstance(labels, LabelSet) else self.encoder.bake_labels(labels)
        label_set.check_space(self.encoder.space)
        return label_set

    def _embed(
        self, images: ImageBatch, deadline: Deadline, *next_work: DeviceWork
    ) -> StepResult[FloatArray]:
        """Embed pictures as planned.

        Args:
            images: the pictures.
            deadline: deadline of the whole call.
            next_work: what the device does with the embeddings next.
        """
        tower = self._route.tower
        try:
            if tower is not None and len(images):
                return tower.embed(images, deadline, *next_work)
            return StepResult(self.encoder.encode_pixels(images.pixels), "device")
        finally:
            self._start_review()

    def _compare(
        self,
        embedded: StepResult[FloatArray],
        remote: Callable[[FloatArray, Deadline], T] | None,
        local: Callable[[FloatArray], T] | None,
        device_work: DeviceWork,
        deadline: Deadline,
    ) -> StepResult[T]:
        """Compare embeddings with the labels or index of the server, or with local ones."""
        embeddings, count = embedded.value, len(embedded.value)
        if remote is not None and local is None:
            return StepResult(remote(embeddings, deadline), "server")
        if remote is not None and local is not None and count:
            return self._fallback.run(
                partial(remote, embeddings),
                partial(local, embeddings),
                (device_work,),
                count,
                deadline,
            )
        assert local is not None
        with self._times.measured(device_work, count):
            return StepResult(local(embeddings), embedded.source, embedded.degraded)

    def _start_review(self) -> None:
        """Review an adaptive plan in the background, if a review is due and none is running."""
        if self._adaptive is None or self._review_pool is None or not self._adaptive.is_due:
            return
        if self._review_lock.acquire(blocking=False):
            try:
                self._review_pool.submit(self._review, self._adaptive)
            except RuntimeError:  # after `close`: no review will run and release the lock
                self._review_lock.release()

    def _review(self, adaptive: "AdaptivePlan") -> None:
        try:
            before, plan = self._route, adaptive.review()
            if plan.name == before.plan.name:
                self._route = replace(before, plan=plan)  # with the new prediction
                return
            assert self._server is not None
            try:
                self._route = self._open_route(plan, self._server)
            except EdgeClipError as error:
                _log.warning("cannot change to the plan %r: %s", plan.name, error)
                adaptive.exclude(plan)
            else:
                _log.info("plan %r replaces %r", plan.name, before.plan.name)
        except Exception:
            _log.exception("the review of the plan failed")
        finally:
            self._review_lock.release()


def _observe(adaptive: "AdaptivePlan", transfer: Transfer) -> None:
    adaptive.observe(
        sent=transfer.sent,
        received=transfer.received,
        ms=transfer.ms,
        server_ms=transfer.server_ms,
        timed_out=transfer.timed_out,
        is_predicted=transfer.rows == 1 and transfer.model == adaptive.current.model,
    )


def _check_top(top: int) -> None:
    if top < 1:
        raise InputError(f"top is {top}: ask for at least 1 answer")
