"""The rewrites of a tower's fp32 graph: tried on this machine, in the form that a bundle has."""

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.embed_pairs import tower_inputs
from edgeclip.export.to_onnx import STANDARD
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.tune_graph import PassOutcome, tune_graph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.tower_feed import tower_feed

_TUNED_ON = 4  # inputs, on which a rewritten graph must give what it gave before


def tune_tower(
    student: DualEncoder, graph: TowerGraph, device: DeviceProfile, sample: Source
) -> tuple[PassOutcome, ...]:
    """Apply to a tower's graph, in place, what makes it faster on this machine.

    Args:
        student: whose tower it is.
        graph: in fp32.
        device: its engine, which must run here.
        sample: pairs, of which the first few are looked at.

    Raises:
        EngineError: the graph cannot be run here.
        ExportError: it cannot be read.
    """
    spec, tokenizer = student.spec, student.text_tokenizer
    values = next(tower_inputs(sample, graph.tower, spec, tokenizer, count=_TUNED_ON))
    return tune_graph(
        graph.path,
        device,
        tower_feed(values, graph.tower, graph.pixels, spec.image),
        tower=graph.tower,
        # Other runtimes read the text tower too, and an image tower in their form.
        standard=graph.pixels in (None, STANDARD.pixels),
    )
