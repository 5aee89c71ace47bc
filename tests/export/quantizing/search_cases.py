"""Benches and tasks for tests of the search."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import Bounds
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.candidate_evaluator import FinalJudgement
from edgeclip.export.quantizing.config import Config, Float16, Float32, StaticInt8
from edgeclip.export.quantizing.node_groups import Gains, GroupGain, NodeGroup
from edgeclip.export.quantizing.quantization_candidate import (
    CandidateLatency,
    QuantizationCandidate,
    key_of,
)
from edgeclip.export.quantizing.search_task import JudgedPairs, SearchTask
from edgeclip.export.quantizing.sensitivity import GroupDamage, Sensitivity
from edgeclip.runtime.bundle.manifest import GateRecord, keeps_bound
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.three_outcomes import Outcome
from tests.conftest import GATE
from tests.export.quantizing.planted import plant_outlier

Make = Callable[..., Source]

RECIPE = StaticInt8(symmetric=False)
OUTLIER = "node_layer_norm_2"  # of the tiny image tower: what the first layer's MLP reads
CHANNEL = 0
BEHIND_OUTLIER = "layers.0.mlp.fc1"
# R@1 and the lowest percentile are matters of luck with a few pairs and untrained weights.
MEAN_ONLY: dict[Precision, Bounds] = {
    "fp32": Bounds(mean_cosine=0.999, p1_cosine=-1, r1_loss=100, zero_shot_loss=100),
    "fp16": Bounds(mean_cosine=0.999, p1_cosine=-1, r1_loss=100, zero_shot_loss=100),
    "int8": Bounds(mean_cosine=0.995, p1_cosine=-1, r1_loss=100, zero_shot_loss=100),
    "fp8": Bounds(mean_cosine=0.995, p1_cosine=-1, r1_loss=100, zero_shot_loss=100),
}


def exact(value: float) -> Interval:
    return Interval(value, value, value)


def cosine_record(value: float, bound: float = 0.995) -> GateRecord:
    outcome: Outcome = "passed" if keeps_bound(value, ">=", bound) else "failed"
    return replace(GATE, value=value, low=value, high=value, bound=bound, outcome=outcome)


def loss_record(name: str, value: float, bound: float) -> GateRecord:
    """Of points lost, at most `bound`."""
    return replace(
        GATE,
        name=name,
        value=value,
        low=value,
        high=value,
        bound=bound,
        direction="<=",
        unit="points",
        outcome="passed" if keeps_bound(value, "<=", bound) else "failed",
    )


@dataclass
class SumBench:
    """A tower whose damages and gains add up, so that the best answer is known.

    Attributes:
        damages: loss of cosine of each node that is in int8.
        saved: share of fp32's time that each node saves in int8.
        eased: shares of the damage that are left by a remedy of that name.
        test_loss: what is lost on the test pairs beside that.
        impossible: keys of configs that cannot be made.
        known: points by key, as a store holds them.
        made: configs that were measured, in order.
    """

    damages: Mapping[str, float]
    saved: Mapping[str, float]
    eased: Mapping[str, float] = field(default_factory=dict)
    test_loss: float = 0.0
    impossible: frozenset[str] = frozenset()
    measured: bool = True
    known: dict[str, QuantizationCandidate] = field(default_factory=dict)
    made: list[Config] = field(default_factory=list)
    judged: list[Config] = field(default_factory=list)
    raced: list[tuple[Config, ...]] = field(default_factory=list)

    @property
    def groups(self) -> tuple[NodeGroup, ...]:
        return tuple(NodeGroup(name, (name,), (name,)) for name in self.damages)

    def is_known(self, config: Config) -> bool:
        return key_of(config) in self.known

    def evaluate(self, config: Config) -> QuantizationCandidate:
        if not self.is_known(config):
            if key_of(config) in self.impossible:
                raise ExportError("cannot be made")
            self.made.append(config)
            self.known[key_of(config)] = self._point(config)
        return self.known[key_of(config)]

    def damage(self, config: StaticInt8) -> Sensitivity:
        groups = [
            GroupDamage(
                title=name, nodes=(name,), divergence=exact(value), cosine_loss=exact(value)
            )
            for name, value in sorted(self.damages.items(), key=lambda item: -item[1])
        ]
        return Sensitivity(
            config=key_of(config), groups=tuple(groups), inputs=8, runs=800, seconds=4.0
        )

    def gains(self, config: StaticInt8) -> Gains:
        found = [GroupGain(nodes=(name,), saved=value) for name, value in self.saved.items()]
        return Gains(groups=tuple(found), measured=self.measured)

    def with_smoothing(self, config: StaticInt8) -> StaticInt8:
        return replace(config, smoothing=(("norm", 0.5),)) if "smoothed" in self.eased else config

    def with_islands(self, config: Float16) -> Float16:
        return config

    def race(self, configs: Sequence[Config]) -> tuple[CandidateLatency, ...]:
        self.raced.append(tuple(configs))
        return tuple(self._latency(config) for config in configs)

    def judge_on_test(self, config: Config) -> FinalJudgement:
        self.judged.append(config)
        record = cosine_record(1 - self.loss(config) - self.test_loss)
        return FinalJudgement(config=key_of(config), records=(record,))

    def loss(self, config: Config) -> float:
        """Of cosine."""
        if not isinstance(config, StaticInt8):
            return 0.0
        loss = sum(value for name, value in self.damages.items() if name not in config.kept)
        on = {
            "smoothed": bool(config.smoothing),
            "percentile": config.ranging.method == "percentile",
        }
        for name, left in self.eased.items():
            loss *= left if on[name] else 1.0
        return min(loss, 2.0)

    def ratio(self, config: Config) -> float:
        """To fp32's time."""
        if isinstance(config, Float32):
            return 1.0
        if not isinstance(config, StaticInt8):
            return 1.1
        return 1 - sum(value for name, value in self.saved.items() if name not in config.kept)

    def _latency(self, config: Config) -> CandidateLatency:
        ratio = self.ratio(config)
        return CandidateLatency(
            load_ratios=loads_around(ratio),
            ms=exact(10 * ratio),
            reference_ms=exact(10.0),
            contended=False,
        )

    def _point(self, config: Config) -> QuantizationCandidate:
        quantized = isinstance(config, StaticInt8)
        kept = len(config.kept) if isinstance(config, StaticInt8) else 0
        return QuantizationCandidate(
            config=config,
            bytes=1000 + 100 * kept if quantized else 4000,
            latency=self._latency(config) if self.measured else None,
            records=(cosine_record(1 - self.loss(config)),),
            seconds=1.0,
        )


def loads_around(ratio: float) -> tuple[float, ...]:
    """Ratios of loads that differ by 0.1%."""
    return (0.999 * ratio, ratio, ratio, ratio / 0.999)


def planted_task(
    clip: DualEncoder, towers: TowerPaths, folder: Path, device: DeviceProfile, blobs: Make
) -> SearchTask:
    """The tiny image tower with an outlier in one of its norms; nothing is timed."""
    path = folder / "planted.onnx"
    save_graph(plant_outlier(load_graph(towers.image), OUTLIER, CHANNEL), path)
    return tower_task(clip, path, device, blobs)


def tower_task(clip: DualEncoder, path: Path, device: DeviceProfile, blobs: Make) -> SearchTask:
    """Any image tower of the tiny student."""
    return SearchTask(
        student=clip,
        graph=TowerGraph("image", "fp32", path, "float32-nchw"),
        device=device,
        ranges=blobs(24, 1),
        steering=JudgedPairs(pairs=blobs(32, 2)),
        test=JudgedPairs(pairs=blobs(32, 3)),
        bounds=MEAN_ONLY,
    )


def without_seconds(points: Sequence[QuantizationCandidate]) -> tuple[QuantizationCandidate, ...]:
    """Points less how long they took, which no two runs agree in."""
    return tuple(replace(point, seconds=0.0) for point in points)
