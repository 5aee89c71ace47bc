import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.candidate_evaluator import open_evaluator
from edgeclip.export.quantizing.config import (
    Config,
    Float16,
    Float32,
    StaticInt8,
    describe,
    key,
)
from edgeclip.export.quantizing.node_groups import Gains
from edgeclip.export.quantizing.quantization_candidate import QuantizationCandidate
from edgeclip.export.quantizing.search import SearchResult, search
from edgeclip.export.quantizing.search_table import search_table
from edgeclip.export.quantizing.search_task import SearchSpace, search_space
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.errors import EngineError
from tests.export.quantizing.search_cases import (
    RECIPE,
    SumBench,
    cosine_record,
    loads_around,
    loss_record,
    planted_task,
    tower_task,
    without_seconds,
)

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
PLAIN = SearchSpace(recipe=RECIPE, smoothing=False)


def kept_of(result: SearchResult) -> set[str]:
    assert isinstance(result.chosen.config, StaticInt8)
    return set(result.chosen.config.kept)


def test_all_int8_is_shipped_where_it_is_inside_its_gates() -> None:
    bench = SumBench(damages={"a": 0.001, "b": 0.002}, saved={"a": 0.1, "b": 0.2})
    result = search(bench, PLAIN)
    assert kept_of(result) == set()
    assert result.complete
    assert bench.made == [Float32(), RECIPE]  # nothing faster can be expected
    assert bench.judged == [RECIPE]


def test_the_group_to_blame_goes_back_and_no_other() -> None:
    damages = {"a": 0.001, "bad": 0.9, "b": 0.001, "c": 0.0005}
    bench = SumBench(damages=damages, saved=dict.fromkeys(damages, 0.1))
    result = search(bench, PLAIN)
    assert kept_of(result) == {"bad"}
    assert result.chosen.passed
    assert result.damage is not None
    assert result.damage.groups[0].title == "bad"


def test_what_int8_makes_no_faster_stays_in_float_whatever_it_damages() -> None:
    bench = SumBench(damages={"a": 0.001, "slow": 0.0}, saved={"a": 0.2, "slow": -0.05})
    result = search(bench, PLAIN)
    assert kept_of(result) == {"slow"}
    unmeasured = replace_measured(bench)
    assert kept_of(search(unmeasured, PLAIN)) == set()


def replace_measured(bench: SumBench) -> SumBench:
    return SumBench(damages=bench.damages, saved=bench.saved, measured=False)


def test_of_two_that_would_do_the_one_that_saves_less_time_goes() -> None:
    bench = SumBench(
        damages={"cheap": 0.004, "dear": 0.004, "rest": 0.0001},
        saved={"cheap": 0.01, "dear": 0.3, "rest": 0.1},
    )
    assert kept_of(search(bench, PLAIN)) == {"cheap"}


def test_groups_that_went_in_vain_are_taken_back() -> None:
    """`small` damages most for its time, but with `large` gone it need not go."""
    bench = SumBench(
        damages={"small": 0.002, "large": 0.0049, "rest": 0.0005},
        saved={"small": 0.02, "large": 0.1, "rest": 0.1},
    )
    assert kept_of(search(bench, PLAIN)) == {"large"}


def test_what_is_too_much_all_alone_goes_however_much_time_it_saves() -> None:
    bench = SumBench(
        damages={"fine": 0.004, "too much": 0.02}, saved={"fine": 0.005, "too much": 0.09}
    )
    assert kept_of(search(bench, PLAIN)) == {"too much"}


def test_remedies_come_before_float_and_only_as_far_as_they_are_needed() -> None:
    bench = SumBench(
        damages={"a": 0.008}, saved={"a": 0.3}, eased={"smoothed": 0.5, "percentile": 0.1}
    )
    result = search(bench, search_space(cpu(), "image", here=False))
    assert isinstance(result.chosen.config, StaticInt8)
    assert result.chosen.config.smoothing
    assert result.chosen.config.ranging.method == "minmax"
    assert kept_of(result) == set()


def test_a_remedy_that_holds_all_gates_is_enough_though_another_form_is_closer_on_average() -> None:
    class Tailed(SumBench):
        """One gate is missed without smoothing, which costs some of the mean."""

        def _point(self, config: Config) -> QuantizationCandidate:
            found = super()._point(config)
            if not isinstance(config, StaticInt8):
                return found
            smoothed = bool(config.smoothing)
            lost = loss_record("R@1 loss", 0.0 if smoothed else 2.0, bound=1.0)
            return replace(found, records=(*found.records, lost))

    bench = Tailed(damages={"a": 0.001, "b": 0.001}, saved={"a": 0.1, "b": 0.1})
    bench.eased = {"smoothed": 1.5}
    result = search(bench, replace(PLAIN, smoothing=True))
    assert isinstance(result.chosen.config, StaticInt8)
    assert result.chosen.config.smoothing
    assert kept_of(result) == set()
    assert result.damage is None


def test_a_collapse_is_not_treated_with_finer_ranges() -> None:
    bench = SumBench(
        damages={"a": 0.9, "b": 0.001}, saved={"a": 0.3, "b": 0.3}, eased={"percentile": 0.999}
    )
    search(bench, search_space(cpu(), "image", here=False))
    configs = [item for item in bench.made if isinstance(item, StaticInt8)]
    assert not any(item.ranging.method == "percentile" for item in configs)


def cpu() -> DeviceProfile:
    return load_device("x86-avx512-vnni")


def test_what_may_be_shipped_races_each_other_and_the_race_decides() -> None:
    """Each was timed in a minute of its own, in which int8 looked better or worse than it is."""

    class Moody(SumBench):
        def evaluate(self, config: Config) -> QuantizationCandidate:
            found = super().evaluate(config)
            if isinstance(config, Float32) or found.latency is None:
                return found
            flattered = 0.3 if isinstance(config, StaticInt8) and config.per_channel else 0.9
            latency = replace(found.latency, load_ratios=loads_around(flattered))
            return replace(found, latency=latency)

        def ratio(self, config: Config) -> float:
            if isinstance(config, StaticInt8):
                return 0.6 if config.per_channel else 0.5
            return super().ratio(config)

    space = replace(PLAIN, cheaper=(lambda config: replace(config, per_channel=False),))
    bench = Moody(damages={"a": 0.001}, saved={"a": 0.1})
    lines: list[str] = []
    result = search(bench, space, progress=lines.append)
    coarse = replace(RECIPE, per_channel=False)
    assert bench.raced == [(RECIPE, coarse)]
    assert result.chosen.config == coarse
    assert result.chosen.ratio == pytest.approx(0.5)
    raced = [point.ratio for point in result.candidates if point.config == RECIPE]
    assert raced == pytest.approx([0.6])
    assert any("in the same rounds" in line for line in lines)
    alone = Moody(damages={"a": 0.001}, saved={"a": 0.1})
    search(alone, PLAIN)
    assert alone.raced == []


def test_nothing_is_shipped_that_is_not_surely_faster() -> None:
    bench = SumBench(damages={"a": 0.001}, saved={"a": 0.0005})
    result = search(bench, PLAIN)
    assert result.chosen.config == Float32()
    assert "surely faster" in result.why
    assert bench.judged == []


def test_fp32_is_shipped_where_nothing_passes() -> None:
    bench = SumBench(damages={"a": 0.5, "b": 0.5}, saved={"a": 0.3, "b": 0.3})
    result = search(bench, PLAIN)
    assert result.chosen.config == Float32()
    assert "inside its gates" in result.why


def test_what_misses_on_the_test_pairs_is_not_shipped_and_each_is_looked_at_once() -> None:
    bench = SumBench(damages={"a": 0.001, "b": 0.001}, saved={"a": 0.1, "b": 0.1}, test_loss=0.1)
    result = search(bench, replace(PLAIN, others=(Float16(),)))
    assert result.chosen.config == Float32()
    assert "missed on the test pairs" in result.why
    assert len({key(config) for config in bench.judged}) == len(bench.judged)


def test_where_looking_fails_what_was_found_so_far_counts() -> None:
    class Unprofiled(SumBench):
        def gains(self, config: StaticInt8) -> Gains:
            raise EngineError("no profile")

        def with_islands(self, config: Float16) -> Float16:
            raise EngineError("cannot be run")

    bench = Unprofiled(damages={"a": 0.001}, saved={"a": 0.1})
    result = search(bench, replace(PLAIN, others=(Float16(),)))
    assert result.chosen.config == RECIPE
    assert dict(result.failed) == {describe(RECIPE): "no profile", "fp16": "cannot be run"}


def test_configs_that_cannot_be_made_are_told_and_the_search_goes_on() -> None:
    bench = SumBench(damages={"a": 0.001}, saved={"a": 0.3}, impossible=frozenset({key(Float16())}))
    result = search(bench, replace(PLAIN, others=(Float16(),)))
    assert result.failed == (("fp16", "cannot be made"),)
    assert result.chosen.config == RECIPE
    assert "not possible here: fp16: cannot be made" in search_table(result)


@settings(max_examples=40)
@example(damages=[0.005000000000000001, 0.02], saved=[0.05] * 9)  # at the bound but for rounding
@example(damages=[0.0025, 0.0025, 0.005], saved=[0.05] * 9)
@given(
    damages=st.lists(st.floats(1e-5, 0.02), min_size=2, max_size=9),
    saved=st.lists(st.floats(0.005, 0.09), min_size=9, max_size=9),
)
def test_what_is_chosen_is_inside_its_gates_and_hardly_slower_than_the_best(
    damages: list[float], saved: list[float]
) -> None:
    names = [f"group {number}" for number in range(len(damages))]
    gains = dict(zip(names, saved, strict=False))
    bench = SumBench(damages=dict(zip(names, damages, strict=True)), saved=gains)
    result = search(bench, PLAIN)
    choices = [
        gains_of(names, kept, gains)
        for size in range(len(names))
        for kept in itertools.combinations(names, size)
        if cosine_record(1 - bench.loss(replace(RECIPE, kept=kept))).passed
    ]
    if not choices:
        assert result.chosen.config == Float32()
        return
    assert result.chosen.passed
    # Greedy by damage for the time: what it leaves is at most one group's worth.
    found = 1 - (result.chosen.ratio or 1.0)
    assert found >= max(choices) - max(saved) - 0.011


def gains_of(names: list[str], kept: tuple[str, ...], saved: dict[str, float]) -> float:
    return sum(saved[name] for name in names if name not in kept)


def test_a_search_without_time_ships_what_it_has_and_a_rerun_goes_on() -> None:
    damages = {"a": 0.001, "bad": 0.9, "b": 0.001}
    bench = SumBench(damages=damages, saved=dict.fromkeys(damages, 0.1))
    ticks = itertools.count()
    first = search(bench, PLAIN, minutes=2 / 60, clock=lambda: float(next(ticks)))
    assert not first.complete
    assert "run it again" in search_table(first)
    before = len(bench.made)
    whole = search(bench, PLAIN)
    fresh = SumBench(damages=damages, saved=bench.saved)
    assert whole == search(fresh, PLAIN)
    assert len(bench.made) == len(fresh.made)  # nothing was measured again
    assert before < len(bench.made)


def test_the_front_holds_what_no_other_beats() -> None:
    damages = {"a": 0.004, "b": 0.004, "c": 0.004, "d": 0.0001}
    result = search(SumBench(damages=damages, saved=dict.fromkeys(damages, 0.1)), PLAIN)
    for point in result.front:
        assert point.cosine is not None
        assert not any(
            other.cosine is not None
            and (other.ratio or 1) < (point.ratio or 1)
            and other.cosine.value >= point.cosine.value
            for other in result.candidates
        )
    assert result.candidates[0] in result.front  # fp32 loses nothing


def test_spaces_follow_the_device() -> None:
    old = search_space(load_device("x86-avx2"), "image", here=True)
    assert old.recipe is not None
    assert old.recipe.reduce_range
    assert any(not change(old.recipe).reduce_range for change in old.cheaper)
    away = search_space(load_device("x86-avx2"), "image", here=False)
    assert away.cheaper == ()  # whether products saturate shows on the device alone
    gpu = search_space(load_device("rtx-4000-ada"), "image", here=False)
    assert gpu.recipe == StaticInt8(symmetric=True, float_precision="fp16")
    kinds = {type(config).__name__ for config in gpu.others}
    assert kinds == {"Float16", "Float8"}
    text = search_space(cpu(), "text", here=True, dynamic=True)
    assert {type(config).__name__ for config in text.others} >= {"DynamicInt8", "WeightOnly"}


KILLED = """
import sys
from pathlib import Path
from edgeclip.export.quantizing.candidate_evaluator import open_evaluator
from edgeclip.export.quantizing.search import search
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.runtime.device.device_profile import DeviceProfile
from tests.export.conftest import Blobs, tiny_clip
from tests.export.quantizing.search_cases import planted_task
from tests.export.quantizing.test_search import PLAIN

folder, image = map(Path, sys.argv[1:])
device = DeviceProfile(
    name="test-cpu",
    description="one thread",
    engine="onnxruntime-cpu",
    precisions=("fp32", "fp16", "int8"),
    threads=1,
    memory_mb=1000,
)
task = planted_task(tiny_clip(), TowerPaths(image, image, "float32-nchw"), folder, device, Blobs)
with open_evaluator(task, folder / "points") as trial:
    search(trial, PLAIN, progress=lambda line: print(line, flush=True))
print("not killed", flush=True)
"""


def test_a_search_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    cpu_device: DeviceProfile,
    blobs: Make,
    tmp_path: Path,
) -> None:
    folder, other = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    other.mkdir()
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(clip_towers.image)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(root)]))},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(2)]  # a point, and what comes after it
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "int8" in seen[0]
    kept = {path.name for path in (folder / "points").glob("candidate-*.json")}
    assert len(kept) >= 2  # fp32 and all in int8

    made: list[str] = []
    resumed = searched(planted_task(clip, clip_towers, folder, cpu_device, blobs), folder, made)
    whole = searched(planted_task(clip, clip_towers, other, cpu_device, blobs), other, [])
    assert without_seconds(resumed.candidates) == without_seconds(whole.candidates)
    assert resumed.chosen.config == whole.chosen.config
    assert resumed.judged == whole.judged
    assert resumed.why == whole.why
    assert resumed.damage is not None
    assert whole.damage is not None
    assert resumed.damage.groups == whole.damage.groups
    assert kept <= {path.name for path in (folder / "points").glob("candidate-*.json")}


def searched(task: object, folder: Path, made: list[str]) -> SearchResult:
    with open_evaluator(task, folder / "points") as trial:  # type: ignore[arg-type]
        return search(trial, PLAIN, progress=made.append)


def test_a_real_tower_is_timed_against_fp32_and_judged_once(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    cpu_device: DeviceProfile,
    blobs: Make,
    tmp_path: Path,
) -> None:
    from tests.conftest import QUICK

    task = replace(tower_task(clip, clip_towers.image, cpu_device, blobs), workload=QUICK)
    with open_evaluator(task, tmp_path) as trial:
        result = search(trial, search_space(cpu_device, "image", here=True), rank=True)
        for point in result.candidates:
            assert point.latency is not None
            ratio = point.latency.ratio
            assert ratio.low <= ratio.value <= ratio.high
            assert point.records
        assert result.damage is not None
        assert len(result.damage.groups) >= len(trial.groups)
        assert result.gains is not None
        assert result.gains.measured
    with open_evaluator(task, tmp_path) as trial:
        assert search(trial, search_space(cpu_device, "image", here=True), rank=True) == result


def test_a_device_that_is_not_here_gets_bytes_and_no_times(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    device = replace(load_device("rtx-4000-ada"), pixels="float32-nchw")
    task = tower_task(clip, clip_towers.image, device, blobs)
    with open_evaluator(task, tmp_path) as trial:
        result = search(trial, search_space(device, "image", here=False))
    assert all(point.latency is None for point in result.candidates)
    assert result.chosen.bytes == min(point.bytes for point in result.candidates if point.passed)
    assert result.gains is not None
    assert not result.gains.measured
    assert "not the device" in result.why
