"""Run the whole pipeline on EmojiScenes: cache, distil, export, evaluate, benchmark, report."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgeclip.compress.built_in import BUILT_IN_TEACHER, built_in_teacher, require_checkout
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import MARKER, DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.checkpoint import checkpoint_folder
from edgeclip.compress.train.recipe import DistillRecipe, load_recipe
from edgeclip.compress.train.run_recipe import prepare_run
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.demo.evaluate import evaluate, evaluate_unseen, measure_latency
from edgeclip.export.demo.summary import (
    DemoSummary,
    report_data,
    summarise,
    summary_rows,
    summary_table,
)
from edgeclip.export.gates.zero_shot import emoji_zero_shot
from edgeclip.export.graph.to_onnx import GraphForm, export_towers
from edgeclip.profiles.record.measurement import measurement_run
from edgeclip.profiles.report.bundle_report import RunStep, bundle_page
from edgeclip.profiles.report.write_page import write_html
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, atomic_directory, check_target
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder

KEPT_BUNDLE = Path(__file__).parents[1] / "emoji_bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Sizes of a demo run.

    Attributes:
        quick: measure the bundle kept in the repository instead of training a student.
        recipe: how the student is trained.
        test_scenes: number of scenes of the retrieval test.
        gate_scenes: number of scenes that the bundle's gates are judged on; as many as decide.
    """

    quick: bool = False
    recipe: DistillRecipe = field(default_factory=lambda: load_recipe("demo"))
    calibration_scenes: int = 256
    test_scenes: int = 1_000
    gate_scenes: int = 3_000
    unseen_scenes: int = 500
    workload: str = "demo"


class StepTimer:
    """Print a message at the beginning of each step, and record how long the step took."""

    def __init__(self) -> None:
        self.done: list[RunStep] = []

    @contextmanager
    def step(self, name: str, message: str) -> Iterator[None]:
        """Time the block as step `name`."""
        print(f"[{len(self.done) + 1}] {message}", flush=True)
        start = time.monotonic()
        yield
        self.done.append(RunStep(name, time.monotonic() - start))


def run_demo(settings: DemoSettings, out: Path, *, command: str) -> DemoSummary:
    """Run all steps; write `summary.json`, `measurements.json`, `report.html` and the bundle.

    An interrupted run with the same `out` is resumed.
    """
    check_target(out / "student", replace=True, marker=MARKER)
    check_target(out / "bundle", replace=True, marker=MANIFEST_NAME)
    steps, device = StepTimer(), load_device("this-machine")
    workload = load_workload(settings.workload)
    with steps.step("teacher", "load the teacher and write its towers as ONNX"):
        teacher = DualEncoder.load(built_in_teacher())
        teacher_onnx = export_towers(teacher, out / "teacher", GraphForm.for_device(device))
    if settings.quick:
        bundle, log = kept_bundle(teacher, out), None
    else:
        student, log = train_student(teacher, settings, out, steps)
        with steps.step("export", "export, quantize, check the gates, write the bundle"):
            bundle = bundle_student(student, teacher, settings, device, out, command)
    test = test_source(settings, teacher)
    with steps.step("quality", f"retrieval over {len(test):,} unseen scenes"):
        models = evaluate(teacher, bundle, device, test)
        unseen = evaluate_unseen(teacher, bundle, device, settings.unseen_scenes)
    with steps.step("latency", "latency of teacher and student, side by side"):
        measured = measure_latency(teacher, teacher_onnx, bundle, device, workload)
    shipped = Encoder(bundle, device).precisions
    rows = summary_rows(models, BUILT_IN_TEACHER, teacher_onnx, bundle, shipped, measured)
    summary = summarise(
        "kept in the repository" if settings.quick else "trained in this run",
        models=models,
        unseen=unseen,
        shipped=shipped,
        measured=measured,
        steps=steps.done,
        command=command,
    )
    measurement_run(measured, workload=workload, command=command).save(out / "measurements.json")
    report = report_data(
        summary, bundle, shipped, test, models, unseen, rows, measured, steps.done, log
    )
    write_html(bundle_page(report), out / "report.html")
    summary.save(out / "summary.json")
    print("\n" + summary_table(rows, measured, steps.done, summary))
    return summary


def kept_bundle(teacher: DualEncoder, out: Path) -> Bundle:
    """Copy the bundle of the repository to `out`, after checking that it fits the teacher.

    Raises:
        BundleError: the bundle was altered.
        ConfigError: the bundle is missing, as in an installed wheel.
        SpaceMismatchError: it belongs to another teacher.
    """
    require_checkout(KEPT_BUNDLE / MANIFEST_NAME, "the files of the built-in student")
    bundle = Bundle.open(KEPT_BUNDLE)
    check_space(teacher.space, bundle.manifest.space, f"the bundle {KEPT_BUNDLE}")
    with atomic_directory(out / "bundle", replace=True) as folder:
        shutil.copytree(KEPT_BUNDLE, folder, dirs_exist_ok=True)
    return Bundle.open(out / "bundle")


def train_student(
    teacher: DualEncoder, settings: DemoSettings, out: Path, steps: StepTimer
) -> tuple[DualEncoder, Path]:
    """Cache the teacher's embeddings, distil and save a student; return it with its log."""
    recipe, size = settings.recipe, teacher.image_spec.size
    scenes = EmojiSource("train", recipe.count, size=size)
    resumed = ", resumed" if (out / "cache").exists() else ""
    with steps.step("cache" + resumed, f"teacher embeddings of {len(scenes):,} scenes"):
        build_cache(teacher, scenes, out / "cache")
    resumed = ", resumed" if checkpoint_folder(out / "run") else ""
    count = recipe.training.steps
    with steps.step("distil" + resumed, f"a student in the teacher's space, {count:,} steps"):
        end = prepare_run(recipe, run=out / "run", cache=out / "cache").train()
        end.student.save(out / "student")
    return end.student, out / "run" / "log.jsonl"


def bundle_student(
    student: DualEncoder,
    teacher: DualEncoder,
    settings: DemoSettings,
    device: DeviceProfile,
    out: Path,
    command: str,
) -> Bundle:
    """Export the student to a verified bundle."""
    count, size = settings.calibration_scenes, teacher.image_spec.size
    plan = BundlePlan(
        student=student,
        teacher=teacher,
        calibration=EmojiSource("calibration", count, size=size),
        test=EmojiSource("test", settings.gate_scenes, size=size, distinct=True),
        device=device,
        origin=Origin(
            name="emoji-student",
            teacher="EmojiScenes teacher (built in)",
            student="inherited, distilled",
            command=command,
            licence="CC-BY-SA-4.0",
        ),
        zero_shot=emoji_zero_shot(teacher, count=settings.gate_scenes, size=size),
    )
    built = build_bundle(
        plan,
        out / "bundle",
        replace=True,
    )
    for line in built.left_out:
        print(f"    left out: {line}")
    for remark in built.bundle.manifest.remarks:
        print(f"    warning: {remark}")
    return built.bundle


def test_source(settings: DemoSettings, teacher: DualEncoder) -> EmojiSource:
    """Return scenes that neither training nor calibration used."""
    size = teacher.image_spec.size
    return EmojiSource("test", settings.test_scenes, size=size, distinct=True)
