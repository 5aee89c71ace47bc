"""Everything that `build_bundle` needs to know: student, device, data, bounds and options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from edgeclip.compress.data.clusters import ClusterBy
from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, Bounds
from edgeclip.export.gates.select_precision import SELECTION_WORKLOAD
from edgeclip.export.gates.teacher_agreement import TeacherBounds
from edgeclip.export.gates.zero_shot import ZeroShotSet, find_zero_shot
from edgeclip.export.graph.calibration import CalibrationSource
from edgeclip.export.graph.embedders import (
    TOWERS,
    check_captions,
    judging_device,
    source_clusters,
)
from edgeclip.export.graph.to_onnx import GraphForm
from edgeclip.export.quantizing.config import Config, default_config
from edgeclip.export.quantizing.qat_finetune import QatOptions
from edgeclip.export.quantizing.quantization_file import (
    FILE_NAME,
    Quantization,
    TowerQuantization,
)
from edgeclip.export.quantizing.search_task import MAX_TEST_JUDGEMENTS
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.clusters import Clusters


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a bundle comes from, for its manifest.

    Attributes:
        name: the name of the model.
        teacher: the teacher's path or hub id.
        student: the student's path.
        command: the command line.
        licence: SPDX identifier or a sentence.
    """

    name: str
    teacher: str
    student: str
    command: str
    licence: str


@dataclass(frozen=True, kw_only=True, eq=False)
class BundlePlan:
    """A student, and the options of its export to a bundle for one device.

    Attributes:
        student: the model; it is put into evaluation mode.
        calibration: pairs with captions to calibrate int8 on; never those of the test split.
        test: pairs with captions to measure the gates on.
        device: decides which precisions are made, and the format of int8.
        origin: what the manifest says about teacher and student.
        teacher: holds the student to its embedding space by gates; None leaves the bundle a space
            of its own.
        teacher_bounds: the bounds of these gates.
        precisions: the precisions that must be in the bundle besides fp32, which always is; None
            for every precision that the device allows and that passes its gates.
        labels: label sets by name, made by the teacher.
        bounds: the bounds of the gates of each precision.
        label_head: name of the label set of `labels` that the image towers carry, if any.
        patch_features: image towers also give the last hidden state of each patch.
        zero_shot: labelled pictures to judge the loss of zero-shot accuracy on; None for the test
            pictures that a label set of `labels` names.
        text_tower: whether the bundle holds the text tower. Without it, a device classifies by
            label sets and searches by pictures; it is still exported, to judge the image tower.
        workload: how to time the precisions on this machine; None if this machine is not the
            device. Then the bundle's default is fp32, or fp16 for a GPU.
        quantization: the result of a quantization search, whose ranges were found on
            `calibration`; None for the device's default configs.
        qat: options of the fine-tune if int8 misses a gate; None to leave int8 out instead.
        accept_undecided: ship what is inside its gates by the measured values, though the test
            pairs are too few to show it.
        cluster_by: how test pictures that are not independent are found.
        declared_looks: how many students, or counts of test pairs, are tried on the same test data
            until one is shipped.
        space: fingerprint of the bundle's embedding space, the teacher's or the student's own.

    Raises:
        ConfigError: a source that is empty or lacks captions; a calibration source of another
            split or too small; a precision that the device does not allow; or a search made for
            something else, or one that rejected a precision of `precisions`.
        SpaceMismatchError: a label set of another embedding space.
    """

    student: DualEncoder
    calibration: Source
    test: Source
    device: DeviceProfile
    origin: Origin
    teacher: DualEncoder | None = None
    teacher_bounds: TeacherBounds = field(default_factory=TeacherBounds)
    precisions: Sequence[Precision] | None = None
    labels: Mapping[str, LabelSet] = field(default_factory=dict)
    bounds: Mapping[Precision, Bounds] = field(default_factory=lambda: DEFAULT_BOUNDS)
    label_head: str | None = None
    patch_features: bool = False
    zero_shot: ZeroShotSet | None = None
    text_tower: bool = True
    workload: Workload | None = SELECTION_WORKLOAD
    quantization: Quantization | None = None
    qat: QatOptions | None = None
    accept_undecided: bool = False
    cluster_by: ClusterBy = "none"
    declared_looks: int = 1
    space: str = field(init=False)

    def __post_init__(self) -> None:
        space = space_fingerprint(self.student) if self.teacher is None else self.teacher.space
        object.__setattr__(self, "space", space)
        for source in (self.calibration, self.test):
            check_captions(source, "a bundle")
        CalibrationSource(self.calibration)
        asked = self.precisions or ()
        wrong = [item for item in asked if item not in (*self.device.precisions, "fp32")]
        if wrong:
            raise ConfigError(
                f"device {self.device.name!r} does not allow {', '.join(wrong)}: "
                f"choose from {', '.join(self.device.precisions)}"
            )
        self._check_quantization()
        if self.label_head is not None and self.label_head not in self.labels:
            raise ConfigError(f"there is no label set {self.label_head!r} for the label head")
        for label_set in self.labels.values():
            label_set.check_space(self.space)
        if self.zero_shot is not None:
            self.zero_shot.labels.check_space(self.space)

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        self.quantization.basis.check(self.device, self.calibration)
        if self.precisions is not None and self.unused:
            raise ConfigError(
                f"{'; '.join(self.unused)}: do not ask for it, or export without {FILE_NAME}"
            )

    @cached_property
    def clusters(self) -> Clusters | None:
        """Which test pictures belong together, int64 [N]; None if all are independent."""
        return source_clusters(self.teacher or self.student, self.test, self.cluster_by)

    @property
    def looks(self) -> int:
        """How many candidates may have been held against the test pairs: see `judge_gates`."""
        searched = 1 if self.quantization is None else MAX_TEST_JUDGEMENTS
        return self.declared_looks * (searched + (self.qat is not None))

    @property
    def wanted(self) -> tuple[Precision, ...]:
        """The precisions to make; fp32, the reference, comes first."""
        asked = self.device.precisions if self.precisions is None else self.precisions
        return tuple(dict.fromkeys(("fp32", *asked)))

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers that the bundle holds."""
        return TOWERS if self.text_tower else ("image",)

    @property
    def searched(self) -> Mapping[Tower, TowerQuantization]:
        """The result of the search, by tower."""
        return {} if self.quantization is None else self.quantization.towers

    @property
    def configs(self) -> dict[tuple[Tower, Precision], Config]:
        """The config of each graph to make besides fp32."""
        return {place: config for place, config in self._configs.items() if config is not None}

    @property
    def unused(self) -> tuple[str, ...]:
        """One line for each precision of a tower that the quantization search rejected."""
        return tuple(
            f"{tower} {precision}: {FILE_NAME} has no use for it ({self.searched[tower].why})"
            for (tower, precision), config in self._configs.items()
            if config is None
        )

    @property
    def _configs(self) -> dict[tuple[Tower, Precision], Config | None]:
        found = self.quantization
        return {
            (tower, precision): default_config(precision, self.device)
            if found is None
            else found.config_for(tower, precision, self.device)
            for precision in self.wanted[1:]
            for tower in self.towers
        }

    @property
    def labelled(self) -> ZeroShotSet | None:
        """The pictures to judge zero-shot accuracy on; None if no picture has a label."""
        return self.zero_shot or find_zero_shot(self.test, self.labels.values())

    @property
    def form(self) -> GraphForm:
        """The form in which the towers are exported for the device."""
        return GraphForm.for_device(self.device, patch_features=self.patch_features)

    @property
    def judging_device(self) -> DeviceProfile:
        """The device profile that runs the graphs while they are judged."""
        return judging_device(self.device)
