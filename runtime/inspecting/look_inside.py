"""Where a subject's time goes: its stages, and the layers of its tower."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inspecting.layer_times import LayerProfile
from edgeclip.runtime.inspecting.measure_stages import measure_stages
from edgeclip.runtime.inspecting.profile_layers import profile_layers
from edgeclip.runtime.measuring.measurement import StageTime
from edgeclip.runtime.measuring.open_subject import ExactEncoder
from edgeclip.runtime.measuring.sample_pictures import sample_pictures
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.tokenize_text import TextTokenizer

# Captions of usual lengths; a text tower's time depends on that.
_TEXTS = (
    "a photo of a dog",
    "two people on bicycles in front of a red brick house",
    "a bowl of soup",
    "an old fishing boat at the pier on a cloudy morning, seen from above",
)


def stages_of(spec: SubjectSpec) -> tuple[StageTime, ...] | str:
    """Time the stages of a subject that has some, else say why it has none.

    Raises:
        EngineError, BundleError, InputError: see `open_subject`.
    """
    if spec.bundle is None:
        return "not known of a graph of somebody else"
    if spec.part == "image":
        return "a tower alone is one stage; the part 'file' has them all"
    if spec.part == "split":
        return _split_stages(spec)
    encoder: Encoder
    if spec.part == "text":
        encoder = Encoder(Bundle.open(spec.bundle), spec.device)
        if spec.precision is not None and encoder.precisions["text"] != spec.precision:
            return f"only measured in {encoder.precisions['text']}, which the bundle chose"
        return measure_stages(encoder, _fitting_texts(encoder.bundle))
    encoder = ExactEncoder(Bundle.open(spec.bundle), spec.device, spec.precision)
    with ExitStack() as stack:
        return measure_stages(encoder, _pictures(spec, stack))


def layers_of(spec: SubjectSpec) -> LayerProfile | str | None:
    """Time the layers of a tower; None for a subject that is more than a tower.

    A string says why they cannot be told.

    Raises:
        EngineError, BundleError: see `profile_layers`.
    """
    if spec.part not in ("image", "text"):
        return None
    if spec.bundle is None or spec.precision is None:
        return "not looked into for a graph of somebody else"
    return profile_layers(Bundle.open(spec.bundle), spec.part, spec.precision, spec.device)


def _split_stages(spec: SubjectSpec) -> tuple[StageTime, ...] | str:
    from edgeclip.runtime.inspecting.measure_split_stages import measure_split_stages
    from edgeclip.runtime.measuring.open_split import connect
    from edgeclip.runtime.split.http_client import Transfer

    transfers: list[Transfer] = []
    with ExitStack() as stack:
        runtime = connect(spec, Bundle.open(str(spec.bundle)), stack, watch=transfers.append)
        if runtime.plan.kind not in ("image", "cut"):
            return f"a plan of kind {runtime.plan.kind!r} sends no picture"
        return measure_split_stages(runtime, transfers, _pictures(spec, stack))


def _fitting_texts(bundle: Bundle) -> list[str]:
    """Captions of usual lengths, cut where the tower does not take so much."""
    tokenizer = TextTokenizer.from_file(bundle.tokenizer_path, bundle.manifest.spec.text)
    limit, found = tokenizer.spec.context_length, []
    for text in _TEXTS:
        while len(text) > 1 and tokenizer.token_counts([text])[0] > limit:
            text = text[: len(text) // 2]
        found.append(text)
    return found


def _pictures(spec: SubjectSpec, stack: ExitStack) -> list[Path]:
    """The subject's image files, else some that look like photos."""
    if spec.pictures:
        return [Path(path) for path in spec.pictures]
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for number, content in enumerate(sample_pictures()):
        (folder / f"{number}.jpg").write_bytes(content)
    return sorted(folder.iterdir())
