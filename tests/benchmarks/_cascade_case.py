"""The built-in teacher as a bundle, the kept student beside it, and what both are asked.

Each certificate here rests on a single try: there is no ledger.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from _bars import command, say

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.cascade.cascade_eval_set import CascadeEvalSet
from edgeclip.export.cascade.cascade_evaluator import CascadeEvaluator
from edgeclip.export.cascade.certify import CascadePlan, CertificationResult, certify
from edgeclip.export.demo.demo import KEPT_BUNDLE
from edgeclip.runtime.cascade.scores import Margin
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder

BOUND, DELTA = 0.95, 0.05  # what is certified
_BUNDLE_TEST = 64  # scenes that the teacher's bundle is checked on


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """Student and teacher on this machine, and what came of certifying them."""

    student: Encoder
    teacher: Encoder
    eval_set: CascadeEvalSet
    evaluator: CascadeEvaluator
    found: CertificationResult


def open_case(
    folder: Path,
    *,
    gallery: int,
    calibration: int,
    test: int,
    teacher: Path | None = None,
) -> Case:
    """Write the teacher's bundle and a copy of the student's into `folder`; open and certify both.

    The teacher runs in fp32, the student in what its bundle chose. `teacher` is a bundle of the
    teacher that was exported before.
    """
    device = load_device("this-machine")
    if teacher is None:
        teacher = _exported(folder / "teacher", device)
    return _certified(Encoder.open(teacher, device=device), folder, (gallery, calibration, test))


def _exported(folder: Path, device: DeviceProfile) -> Path:
    dual = DualEncoder.load(BUILT_IN_TEACHER)
    size = dual.image_spec.size
    origin = Origin(
        name="emoji-teacher",
        teacher="itself",
        student="EmojiScenes teacher (built in)",
        command="tests/benchmarks",
        licence="CC-BY-SA-4.0",
    )
    bundle_plan = BundlePlan(
        student=dual,
        teacher=dual,
        calibration=EmojiSource("calibration", _BUNDLE_TEST, size=size),
        test=EmojiSource("test", _BUNDLE_TEST, size=size, distinct=True),
        device=device,
        origin=origin,
        precisions=(),
        workload=None,
        accept_undecided=True,  # so few scenes tell that it works
    )
    say(f"exporting the teacher to {folder} ...")
    return build_bundle(bundle_plan, folder).bundle.path


def _certified(teacher: Encoder, folder: Path, counts: tuple[int, int, int]) -> Case:
    shutil.copytree(KEPT_BUNDLE, folder / "student")
    student = Encoder.open(folder / "student", device=teacher.device)
    size, (gallery, calibration, test) = student.spec.image.size, counts
    eval_set = CascadeEvalSet(
        query="image",
        calibration=EmojiSource("calibration", calibration, size=size, distinct=True),
        test=EmojiSource("test", test, size=size, distinct=True),
        gallery=EmojiSource("calibration", gallery, size=size, distinct=True),
    )
    plan = CascadePlan(
        student=student,
        teacher=teacher,
        eval_set=eval_set,
        score=Margin(),
        bound=BOUND,
        delta=DELTA,
        command=command(),
    )
    say("certifying the cascade ...")
    evaluator = plan.evaluator()
    found = certify(plan, evaluator)
    return Case(
        student=student, teacher=teacher, eval_set=eval_set, evaluator=evaluator, found=found
    )
