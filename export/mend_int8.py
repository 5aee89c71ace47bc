"""What a bundle does where int8 misses a gate: it fine-tunes for it, if the user allows that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from edgeclip.export.bundle_plan import BundlePlan
from edgeclip.export.gates import Judged
from edgeclip.export.made_graphs import MadeGraphs, judge_graphs
from edgeclip.export.quantizing.config import Config, StaticInt8
from edgeclip.export.quantizing.last_resort import (
    HINT,
    Int8Task,
    missed_towers,
    plainly,
    tune_int8,
)
from edgeclip.runtime.spec import Precision, Tower

Passes = Mapping[Tower, Sequence[str]]
Progress = Callable[[str], None]


def mend_int8(
    plan: BundlePlan, made: MadeGraphs, passes: Passes, progress: Progress = lambda line: None
) -> MadeGraphs:
    """Fine-tune the student for int8 and quantize it again, if int8 missed a gate.

    Files in int8 are replaced where that is better.

    Args:
        plan: its `tuning` is the fine-tune that is allowed; without one, what comes back says
            how to ask for it.
        made: what quantizing alone gave.
        passes: names of the rewrites that the fp32 graph of a tower has, in order.
        progress: called with a line for a person before each step.

    Raises:
        ConfigError: training data or an earlier run that do not fit.
        ExportError: a tower cannot be exported or quantized.
        EngineError: a graph cannot be run.
        KeyboardInterrupt: Ctrl-C; the same call goes on from the last checkpoint.
    """
    configs = _static(made)
    if not missed_towers(filter(_of_int8, made.verdict.judged), configs):
        return made
    if plan.tuning is None:
        return replace(made, says=HINT)
    task = Int8Task(
        student=plan.student,
        configs=configs,
        calibration=plan.calibration,
        test=plan.test,
        device=plan.device,
        bounds=plan.bounds["int8"],
        form=plan.form,
        passes=passes,
        zero_shot=made.on.zero_shot,
    )
    outcome = tune_int8(task, made.graphs, made.embeddings, plan.tuning, progress)
    if not outcome.tuned:
        return replace(made, says=outcome.says)
    learnt: dict[tuple[Tower, Precision], Config] = {
        (tower, "int8"): plainly(configs[tower]) for tower in outcome.tuned
    }
    return replace(
        judge_graphs(plan, made.graphs, {**made.configs, **learnt}),
        tuned=outcome.tuned,
        note=outcome.note,
        says=outcome.says,
    )


def _static(made: MadeGraphs) -> dict[Tower, StaticInt8]:
    """The configs that can be learnt for."""
    return {
        tower: config
        for (tower, _), config in made.configs.items()
        if isinstance(config, StaticInt8)
    }


def _of_int8(judged: Judged) -> bool:
    """Whether a gate is of int8: of a tower alone, or of both together."""
    return judged.subject.endswith(" int8") or judged.record.name == "R@1 loss int8"
