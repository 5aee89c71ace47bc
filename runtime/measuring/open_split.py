"""A bundle with a server's help, as a subject: from an image file to its embedding by a plan."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.errors import EngineError, MissingExtraError
from edgeclip.runtime.measuring.interleave import Candidate, repeat_rows
from edgeclip.runtime.measuring.measurement import Identity
from edgeclip.runtime.measuring.open_subject import (
    ExactEncoder,
    OpenSubject,
    Remarks,
    identity_of,
    read_pictures,
)
from edgeclip.runtime.measuring.subject import SplitSpec, SubjectSpec
from edgeclip.runtime.planning.cut_set import WEIGHTS_NAME, CutSet, head_name
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.auth import read_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeclip.runtime.split.http_client import Transfer
    from edgeclip.runtime.split.split_runtime import SplitRuntime

_PATIENCE_MS = 10_000.0  # for the first answer of all, whatever the plan's deadline
_ASKS_A_TOWER = ("image", "cut")


class SplitRun:
    """Embeds batches by a plan, and counts the answers that the device gave in its place."""

    def __init__(self, runtime: "SplitRuntime") -> None:
        self._runtime = runtime
        self._calls = 0
        self._degraded = Counter[str]()

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embed encoded pictures, object [N]; float32 [N, dim]."""
        reply = self._runtime.encode_image(list(batch))
        self._calls += 1
        if reply.degraded is not None:
            self._degraded[reply.degraded] += 1
        return reply.value

    def remarks(self) -> Remarks:
        """How often the server had no part in an answer although it should have."""
        if not self._degraded:
            return ()
        reasons = ", ".join(f"{count} by {why}" for why, count in self._degraded.most_common())
        total = self._degraded.total()
        return (("server", f"{total} of {self._calls} answers are the device's own: {reasons}"),)


def open_split(spec: SubjectSpec, bundle: Bundle) -> OpenSubject:
    """Load a bundle and connect to its server, which has to answer once.

    Raises:
        EngineError: the server does not answer.
        MissingExtraError: the extra "split" is not installed.
        InputError, ConfigError, CutSetError, SpaceMismatchError: see `SplitRuntime`.
    """
    assert spec.split is not None
    contents, shape = read_pictures(spec)
    with ExitStack() as stack:
        runtime = connect(spec, bundle, stack)
        _ask_once(runtime, contents[0], spec.split.server)
        identity = identity_of(spec, bundle, "image", runtime.encoder._image_tower, shape)
        run = SplitRun(runtime)
        return OpenSubject(
            candidate=Candidate(spec.title, run, repeat_rows(contents), spec.device.threads),
            identity=_with_server(identity, runtime.plan, spec.split),
            remarks=run.remarks,
            _resources=stack.pop_all(),
        )


def connect(
    spec: SubjectSpec,
    bundle: Bundle,
    stack: ExitStack,
    watch: "Callable[[Transfer], object]" = lambda transfer: None,
) -> "SplitRuntime":
    """Make the runtime of a split; `stack` closes it, and `watch` is told of every transfer.

    Raises:
        MissingExtraError, InputError, ConfigError, CutSetError, SpaceMismatchError: see
            `open_split`.
    """
    split = spec.split
    assert split is not None
    plan = SplitPlan.load(Path(split.plan))
    cuts = None if split.cuts is None else CutSet.open(split.cuts)
    encoder = ExactEncoder(bundle, spec.device, spec.precision)
    try:
        from edgeclip.runtime.split.http_client import Server
        from edgeclip.runtime.split.split_runtime import SplitRuntime
    except ImportError as error:
        if (error.name or "").startswith("edgeclip"):
            raise
        raise MissingExtraError(
            f"a split needs the package {error.name!r}: pip install 'edgeclip[split]'"
        ) from error
    server = None
    if split.server is not None:
        token = read_token(None if split.token_file is None else Path(split.token_file))
        server = stack.enter_context(
            Server(
                split.server, token=token, fingerprint=split.fingerprint, ca=split.ca, watch=watch
            )
        )
    return stack.enter_context(SplitRuntime(encoder, plan, server, cuts=cuts))


def _ask_once(runtime: "SplitRuntime", picture: bytes, server: str | None) -> None:
    """Make sure that the server answers; what is measured would be the device otherwise."""
    reply = runtime.encode_image(picture, deadline_ms=_PATIENCE_MS)
    if reply.degraded is not None:
        raise EngineError(
            f"the server at {server} gave no answer ({reply.degraded}): see that "
            f"`edgeclip serve` runs there with the model {runtime.plan.model!r}, and that token "
            "and certificate are right"
        )


def _with_server(identity: Identity, plan: SplitPlan, split: SplitSpec) -> Identity:
    """Add what the device stores for its part of a cut tower, and who computes the rest."""
    head = 0
    if split.cuts is not None and plan.cut:
        files = (Path(split.cuts, name) for name in (head_name(plan.cut), WEIGHTS_NAME))
        head = sum(file.stat().st_size for file in files if file.is_file())  # checked when opened
    provider = identity.provider
    if plan.kind in _ASKS_A_TOWER:
        provider += f" and {plan.model} at {split.server}"
    return replace(identity, bytes_on_disk=identity.bytes_on_disk + head, provider=provider)
