"""The whole road on EmojiScenes, small but real: teacher, student, bundle, figures, report."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgeclip.compress.built_in import BUILT_IN_TEACHER, built_in_teacher, require_checkout
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import MARKER, DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.demo.evaluate import evaluate, evaluate_unseen, measure_latency
from edgeclip.export.demo.summary import DemoSummary, report_data, summarise, summary_rows, table
from edgeclip.export.gates.zero_shot import emoji_zero_shot
from edgeclip.export.graph.to_onnx import GraphForm, export_towers
from edgeclip.profiles.record.measurement import measurement_run
from edgeclip.profiles.report.report_data import Stage
from edgeclip.profiles.report.write_report import write_report
from edgeclip.profiles.workload import load_workload
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, atomic_directory, check_target
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder

KEPT_BUNDLE = Path(__file__).parents[1] / "emoji_bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """How much of everything; the defaults take about 10 minutes on two cores.

    Attributes:
        quick: measure the bundle kept in the repository instead of training a student.
        scenes: training scenes, each embedded once by the teacher.
        steps: distillation steps.
        test_scenes: retrieval is over this many.
    """

    quick: bool = False
    scenes: int = 20_480
    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    shape: StudentShape = field(default_factory=StudentShape)
    calibration_scenes: int = 256
    test_scenes: int = 1_000
    unseen_scenes: int = 500
    workload: str = "demo"


class StageTimer:
    """Names each stage on the terminal, and keeps how long it took."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @contextmanager
    def stage(self, name: str, says: str) -> Iterator[None]:
        """Time the block as stage `name`."""
        print(f"[{len(self.done) + 1}] {says}", flush=True)
        start = time.monotonic()
        yield
        self.done.append(Stage(name, time.monotonic() - start))


def run_demo(settings: DemoSettings, out: Path, *, command: str) -> DemoSummary:
    """Do everything, write `summary.json`, `measurements.json`, `report.html` and the bundle.

    A run that was stopped goes on where it was, if `out` is the same.
    """
    check_target(out / "student", replace=True, marker=MARKER)
    check_target(out / "bundle", replace=True, marker=MANIFEST_NAME)
    stages, device = StageTimer(), load_device("this-machine")
    workload = load_workload(settings.workload)
    with stages.stage("teacher", "load the teacher and write its towers as ONNX"):
        teacher = DualEncoder.load(built_in_teacher())
        teacher_onnx = export_towers(teacher, out / "teacher", GraphForm.for_device(device))
    if settings.quick:
        bundle, log = kept_bundle(teacher, out), None
    else:
        student, log = train_student(teacher, settings, out, stages)
        with stages.stage("export", "export, quantize, check the gates, write the bundle"):
            bundle = bundle_student(student, teacher, settings, device, out, command)
    test = test_source(settings, teacher)
    with stages.stage("quality", f"retrieval over {len(test):,} unseen scenes"):
        models = evaluate(teacher, bundle, device, test)
        unseen = evaluate_unseen(teacher, bundle, device, settings.unseen_scenes)
    with stages.stage("latency", "latency of teacher and student, side by side"):
        measured = measure_latency(teacher, teacher_onnx, bundle, device, workload)
    shipped = Encoder(bundle, device).precisions
    rows = summary_rows(models, BUILT_IN_TEACHER, teacher_onnx, bundle, shipped, measured)
    summary = summarise(
        "kept in the repository" if settings.quick else "trained in this run",
        models=models,
        unseen=unseen,
        shipped=shipped,
        measured=measured,
        stages=stages.done,
        command=command,
    )
    measurement_run(measured, workload=workload, command=command).save(out / "measurements.json")
    report = report_data(
        summary, bundle, shipped, test, models, unseen, rows, measured, stages.done, log
    )
    write_report(report, out / "report.html")
    summary.save(out / "summary.json")
    print("\n" + table(rows, measured, stages.done, summary))
    return summary


def kept_bundle(teacher: DualEncoder, out: Path) -> Bundle:
    """A copy of the bundle that is kept in the repository, if it is of this teacher's space.

    Raises:
        BundleError: it was altered.
        ConfigError: it is not here, as in an installed wheel.
        SpaceMismatchError: it is another teacher's.
    """
    require_checkout(KEPT_BUNDLE / MANIFEST_NAME, "the files of the built-in student")
    bundle = Bundle.open(KEPT_BUNDLE)
    check_space(teacher.space, bundle.manifest.space, f"the bundle {KEPT_BUNDLE}")
    with atomic_directory(out / "bundle", replace=True) as folder:
        shutil.copytree(KEPT_BUNDLE, folder, dirs_exist_ok=True)
    return Bundle.open(out / "bundle")


def train_student(
    teacher: DualEncoder, settings: DemoSettings, out: Path, stages: StageTimer
) -> tuple[DualEncoder, Path]:
    """Cache the teacher, distil, save; the student and the log of its training."""
    size = teacher.image_spec.size
    scenes = EmojiSource("train", settings.scenes, size=size)
    resumed = ", resumed" if (out / "cache").exists() else ""
    with stages.stage("cache" + resumed, f"teacher embeddings of {len(scenes):,} scenes"):
        cache = build_cache(teacher, scenes, out / "cache")
    resumed = ", resumed" if (out / "run" / "checkpoint.pt").exists() else ""
    with stages.stage(
        "distil" + resumed, f"a student in the teacher's space, {settings.steps:,} steps"
    ):
        student = new_student(teacher, settings.shape)
        train = TrainSettings(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
        )
        run = out / "run"
        distill(student, cache, scenes, weights=LossWeights(), settings=train, out=run)
        student.save(out / "student")
    return student, run / "log.jsonl"


def bundle_student(
    student: DualEncoder,
    teacher: DualEncoder,
    settings: DemoSettings,
    device: DeviceProfile,
    out: Path,
    command: str,
) -> Bundle:
    """Export the student behind its gates."""
    count, size = settings.calibration_scenes, teacher.image_spec.size
    plan = BundlePlan(
        student=student,
        space=teacher.space,
        calibration=EmojiSource("calibration", count, size=size),
        test=test_source(settings, teacher),
        device=device,
        origin=Origin(
            name="emoji-student",
            teacher="EmojiScenes teacher (built in)",
            student="inherited, distilled",
            command=command,
            licence="CC-BY-SA-4.0",
        ),
        zero_shot=emoji_zero_shot(teacher, count=settings.test_scenes, size=size),
    )
    built = build_bundle(
        plan,
        out / "bundle",
        replace=True,
        progress=lambda line: print(f"    {line}", flush=True),
    )
    for line in built.left_out:
        print(f"    left out: {line}")
    for remark in built.bundle.manifest.remarks:
        print(f"    warning: {remark}")
    return built.bundle


def test_source(settings: DemoSettings, teacher: DualEncoder) -> EmojiSource:
    """Scenes that no training or calibration saw."""
    size = teacher.image_spec.size
    return EmojiSource("test", settings.test_scenes, size=size, distinct=True)
