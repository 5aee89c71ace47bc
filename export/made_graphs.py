"""The towers of a bundle in every precision, and what the gates say of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.export.bundle_plan import BundlePlan
from edgeclip.export.judge_precisions import (
    JudgedOn,
    TowerEmbeddings,
    Verdict,
    embed_test,
    judge_precisions,
    judged_on,
)
from edgeclip.export.quantizing.emulate_half import stored_in_half
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.write_precisions import Configs
from edgeclip.runtime.spec import Tower


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MadeGraphs:
    """What was made, before anything is left out.

    Attributes:
        graphs: both towers in fp32, then what was made of them.
        configs: of those that were made of fp32.
        embeddings: of the test pairs, by each graph.
        on: what else they were judged on.
        verdict: every precision held against fp32.
        tuned: towers whose int8 is of a student that was fine-tuned for it.
        note: of that fine-tune, for the bundle's provenance.
        says: what came of int8, for a person; empty where it is as it should be.
    """

    graphs: tuple[TowerGraph, ...]
    configs: Configs
    embeddings: TowerEmbeddings
    on: JudgedOn
    verdict: Verdict
    tuned: tuple[Tower, ...] = ()
    note: str = ""
    says: str = ""


def judge_graphs(plan: BundlePlan, graphs: Sequence[TowerGraph], configs: Configs) -> MadeGraphs:
    """Embed the test pairs with every graph, and hold every precision against fp32.

    Where the device is no CPU, fp16 is rounded as it will be there, see `stored_in_half`.

    Raises:
        EngineError: a graph cannot be run.
    """
    zero_shot = plan.labelled if len(plan.wanted) > 1 else None
    with stored_in_half(graphs, plan.device) as shown:
        embeddings = embed_test(plan.student, shown, plan.test, plan.runner)
        on = judged_on(plan.student, shown, plan.test, zero_shot, embeddings, plan.runner)
    return MadeGraphs(
        graphs=tuple(graphs),
        configs=configs,
        embeddings=embeddings,
        on=on,
        verdict=judge_precisions(embeddings, plan.bounds, on),
    )
