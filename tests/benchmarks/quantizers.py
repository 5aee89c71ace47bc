"""Four ways to int8 side by side: the same towers, the same pairs to calibrate and to test on.

ONNX Runtime's own quantizer with its defaults, optimum-onnx's recipe for CPUs with AVX512-VNNI,
NNCF (for OpenVINO, and its ONNX form for ONNX Runtime), and what EdgeCLIP chooses. Each of the
others gets the plain fp32 export, and where that stays inside the gates in ONNX Runtime, also
EdgeCLIP's fp32 graph, to tell quantizing from the work on the graph. All calibrate on all pairs
that EdgeCLIP has, and run at batch 1 with one thread, texts unpadded. Towers are both of the
built-in student and the ViT of 8 M parameters of `int8_speedup.py`, whose search is gone on with.

Ours must be shown to be no more than 5% slower than any other in ONNX Runtime that is inside its
gates: what is held to 1.05 is the high end of the interval of the ratio of their times, so noise
speaks against us. Our file takes part twice, as a control: a race that does not find it as fast as
itself, within the same 5% either way, can tell nothing of others. OpenVINO is another engine: its
rows are told, not held. So is "ours, dynamic", with which an embedding depends on its batch.

optimum and NNCF are installed in build/quantizers; `--quick` leaves them and the large tower out,
and takes some minutes. The whole takes about twenty minutes on two cores.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from _bars import Bar, Rule, finish, options
from _processes import UnavailableError, environment
from _quantizer_case import (
    FULL,
    HERE,
    OUR_FP32,
    OURS,
    PLAIN,
    PLAIN_FP32,
    QUICK,
    Contest,
    Row,
    Seconds,
    gate_bars,
    make,
    ran_on,
    table,
)
from _quantizer_models import VIT_8M, grown, kept_student

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.quantizing.config import DynamicInt8, default_config
from edgeclip.profiles.record.timing_statistics import paired_ratio
from edgeclip.runtime.spec import Tower

BARS: dict[str, Rule] = {
    "*_ours_over_*": ("<=", 1.05, ""),
    "*_usable_embeddings": (">=", 1.0, "share"),
    "*_mean_cosine": (">=", 0.995, "cosine"),
    "*_1st_percentile_cosine": (">=", 0.98, "cosine"),
    "*_zero_shot_top_1_loss": ("<=", 0.5, "points"),
    "*_R1_loss_*": ("<=", 1.0, "points"),
}
KEPT_MODELS = ("export/emoji_bundle", "compress/emoji_teacher")

OPTIMUM, NNCF = "optimum", "nncf"
REQUIREMENTS = {
    # It asks for a transformers that has known vulnerabilities: never install it elsewhere.
    OPTIMUM: ("optimum-onnx[onnxruntime]==0.1.0", f"torch=={version('torch').split('+')[0]}"),
    NNCF: (
        "nncf==3.4.0",
        f"openvino=={version('openvino')}",
        f"onnx=={version('onnx')}",
        f"onnxruntime=={version('onnxruntime')}",
    ),
}
CHOSEN, AGAIN = "ours", "ours, the same again"
DEFAULT, DYNAMIC, OPENVINO = "ours, not searched", "ours, dynamic", "ours, OpenVINO"
METHODS = (  # name, recipe, home, engine
    ("ORT static", "ort-static", "", "onnxruntime"),
    ("ORT dynamic", "ort-dynamic", "", "onnxruntime"),
    ("optimum static", "optimum-static", OPTIMUM, "onnxruntime"),
    ("optimum dynamic", "optimum-dynamic", OPTIMUM, "onnxruntime"),
    ("NNCF", "nncf-onnx", NNCF, "onnxruntime"),
    ("NNCF, OpenVINO", "nncf-openvino", NNCF, "openvino"),
)
_SLOWER = 1.05  # set beforehand: a margin that followed the noise would pay for noisy races
# The test pairs are no part of what a search is known by: its points are those of int8_speedup.py.
_SIZES = replace(FULL, test=300, labelled=200)

Homes = dict[str, Path | str]  # the interpreter of each environment, or why it is not there


def homes(*, quick: bool) -> Homes:
    found: Homes = {"": HERE, **dict.fromkeys(REQUIREMENTS, "not asked for")}
    for name, requirements in () if quick else REQUIREMENTS.items():
        try:
            found[name] = environment(f"quantizers/{name}", requirements)
        except UnavailableError as error:
            found[name] = str(error)
    return found


def enter_ours(contest: Contest, homes: Homes) -> str:
    """Enter what EdgeCLIP makes; return why that."""
    device, python = contest.task.device, homes[NNCF]
    config, why = contest.enter_chosen(CHOSEN)
    default, dynamic = default_config("int8", device), DynamicInt8(reduce_range=not device.vnni)
    if config != default:
        contest.enter(DEFAULT, contest.write(default, "default"), OURS)
    contest.enter(DYNAMIC, contest.write(dynamic, "dynamic"), OURS)
    chosen = contest.entrants[CHOSEN]
    contest.entrants[AGAIN] = chosen
    if isinstance(python, Path):
        contest.enter(OPENVINO, chosen.model, OURS, engine="openvino", python=python)
    return why


def enter_others(contest: Contest, homes: Homes, scratch: Path) -> None:
    """Enter what each method makes of the plain export; if that is good, of our graph too."""
    for title, recipe, home, engine in METHODS:
        python = homes[home]
        for form, source in ((PLAIN, contest.plain), (OURS, contest.task.graph.path)):
            name = title if form == PLAIN else f"{title} on our graph"
            suffix = ".onnx" if engine == "onnxruntime" else ".xml"
            target = scratch / f"{recipe}-{form}{suffix}"
            try:
                if isinstance(python, str):
                    raise UnavailableError(python)
                make(recipe, source, target, contest.path("calibration", form), python)
            except UnavailableError as error:
                row = Row(model=contest.model, form=name, why=f"not made: {error}")
                contest.rows[name] = row
            else:
                row = contest.enter(name, target, form, engine=engine, python=python)
            if not row.passed or engine != "onnxruntime":
                break


def bars(contest: Contest, raced: Seconds) -> Iterator[Bar]:
    """Ours is inside its gates, as fast as itself, and not much slower than the others."""
    model = contest.model
    yield from gate_bars(model, contest.rows[CHOSEN].records)
    again = paired_ratio(raced[AGAIN], raced[CHOSEN])
    # The end of its interval at which the same file looks most unlike itself.
    worst, name = max(again.high, 1 / again.low), f"{model}_ours_over_itself_worst_end"
    yield Bar(name, worst, "<=", _SLOWER, interval=again)
    for form, row in contest.rows.items():
        ours = form in (PLAIN_FP32, OUR_FP32, CHOSEN, DEFAULT, DYNAMIC)
        entrant = contest.entrants.get(form)
        if not ours and entrant is not None and entrant.engine == "onnxruntime" and row.passed:
            ratio = paired_ratio(raced[CHOSEN], raced[form])
            words = form.lower().replace(",", "").split()
            name = "_".join((model, "ours_over", *words, "high_end"))
            yield Bar(name, ratio.high, "<=", _SLOWER, interval=ratio)


def towers(*, quick: bool) -> Iterator[tuple[str, DualEncoder, Tower]]:
    student = kept_student()
    yield "student", student, "image"
    yield "student", student, "text"
    if not quick:
        yield VIT_8M.name, grown(VIT_8M), "image"


def main() -> int:
    args = options(__doc__).parse_args()
    print(ran_on(), flush=True)
    found = homes(quick=args.quick)
    rows: list[Row] = []
    held: list[Bar] = []
    whys: dict[str, str] = {}
    for name, dual, tower in towers(quick=args.quick):
        model = f"{name}_{tower}"
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            contest = Contest(model, dual, tower, QUICK if args.quick else _SIZES, scratch)
            whys[model] = enter_ours(contest, found)
            enter_others(contest, found, scratch)
            raced, mine = contest.race(1)
        print(f"\n{name}, {tower} tower; ours: {whys[model]}\n{table(mine)}", flush=True)
        held += bars(contest, raced)
        rows += mine
    return finish(held, args.out, requirements=REQUIREMENTS, chosen=whys, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
