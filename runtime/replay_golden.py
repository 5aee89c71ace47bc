"""Replay of a bundle's golden inputs: does this device compute what was exported?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import usable_precisions
from edgeclip.runtime.errors import BundleError
from edgeclip.runtime.golden import Expected, Golden
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.tower_runner import TowerRunner

if TYPE_CHECKING:
    from edgeclip.profiles.device import DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How far one tower in one precision is from its golden embeddings.

    `deviation` is the largest absolute difference of one embedding value, `cosine` the
    smallest cosine of an embedding with the golden one.
    """

    tower: Tower
    precision: Precision
    deviation: float
    cosine: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the manifest's tolerance."""
        return self.deviation <= self.tolerance


def replay_golden(bundle: Bundle, device: "DeviceProfile") -> tuple[Replay, ...]:
    """Run the golden inputs through every tower and precision that the device allows.

    Raises:
        BundleError: the tokenizer gives other ids than it did when the bundle was written,
            or the device allows no precision of the bundle.
        EngineError: a tower cannot be loaded or run.
    """
    golden = bundle.golden()
    if bundle.manifest.has("text"):
        _check_tokenizer(bundle, golden)
    found = []
    for item in golden.expected:
        if item.precision in usable_precisions(bundle.manifest.tower(item.tower), device):
            found.append(_replay(bundle, device, golden, item))
    if not found:
        raise BundleError(f"device {device.name!r} allows no precision that the bundle holds")
    return tuple(found)


def _check_tokenizer(bundle: Bundle, golden: Golden) -> None:
    """Tokenize the golden texts again.

    Raises:
        BundleError: other ids than when the bundle was written.
    """
    from edgeclip.runtime.tokenize_text import TextTokenizer

    tokenizer = TextTokenizer.from_file(bundle.tokenizer_path, bundle.manifest.spec.text)
    ids = tokenizer.encode(golden.texts)
    if not np.array_equal(ids, golden.input_ids):
        raise BundleError(
            f"{bundle.tokenizer_path} gives other token ids than when the bundle was written: "
            "install the version of tokenizers that its provenance names"
        )


def _replay(bundle: Bundle, device: "DeviceProfile", golden: Golden, item: Expected) -> Replay:
    manifest = bundle.manifest.tower(item.tower)
    runner = TowerRunner(bundle, item.tower, item.precision, device)
    embeddings = runner.run(golden.inputs(item.tower))
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(item.embeddings, axis=1)
    cosines = (embeddings * item.embeddings).sum(axis=1) / np.maximum(lengths, 1e-12)
    return Replay(
        tower=item.tower,
        precision=item.precision,
        deviation=float(np.abs(embeddings - item.embeddings).max()),
        cosine=float(cosines.min()),
        tolerance=manifest.file(item.precision).golden_tolerance,
    )
