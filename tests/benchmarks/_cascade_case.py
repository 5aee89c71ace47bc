"""The built-in teacher as a bundle, the kept student beside it, and what both are asked."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.cascade.cascade_eval_set import CascadeEvalSet
from edgeclip.export.demo.demo import KEPT_BUNDLE
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.encoder import Encoder

_FRESH_SEED = 1  # another endless sequence of the same split
_BUNDLE_TEST = 64  # scenes that the teacher's bundle is checked on


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many scenes of each kind."""

    gallery: int
    calibration: int
    test: int
    fresh: int


FULL = Sizes(gallery=5000, calibration=1000, test=2000, fresh=3000)
QUICK = Sizes(gallery=5000, calibration=400, test=1500, fresh=600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Student and teacher on this machine, and scenes that neither was trained on."""

    student: Encoder
    teacher: Encoder
    eval_set: CascadeEvalSet
    fresh: EmojiSource


def open_case(folder: Path, sizes: Sizes) -> Case:
    """Write the teacher's bundle and a copy of the student's into `folder`, and open both.

    The teacher runs in fp32, the student in what its bundle chose.
    """
    dual = DualEncoder.load(BUILT_IN_TEACHER)
    size, device = dual.image_spec.size, load_device("this-machine")
    plan = BundlePlan(
        student=dual,
        space=dual.space,
        calibration=EmojiSource("calibration", _BUNDLE_TEST, size=size),
        test=EmojiSource("test", _BUNDLE_TEST, size=size, distinct=True),
        device=device,
        origin=Origin(
            name="emoji-teacher",
            teacher="itself",
            student="EmojiScenes teacher (built in)",
            command="tests/benchmarks",
            licence="CC-BY-SA-4.0",
        ),
        precisions=(),
        workload=None,
    )
    say(f"exporting the teacher to {folder / 'teacher'}")
    teacher = build_bundle(plan, folder / "teacher").bundle
    shutil.copytree(KEPT_BUNDLE, folder / "student")
    gallery = EmojiSource("calibration", sizes.gallery, size=size, distinct=True)
    eval_set = CascadeEvalSet(
        query="image",
        calibration=EmojiSource("calibration", sizes.calibration, size=size, distinct=True),
        test=EmojiSource("test", sizes.test, size=size, distinct=True),
        gallery=gallery,
    )
    return Case(
        student=Encoder.open(folder / "student", device=device),
        teacher=Encoder(teacher, device),
        eval_set=eval_set,
        fresh=EmojiSource("test", sizes.fresh, size=size, seed=_FRESH_SEED, distinct=True),
    )


def say(line: str) -> None:
    """Tell on stderr what is going on."""
    print(f"{line} ...", file=sys.stderr, flush=True)
