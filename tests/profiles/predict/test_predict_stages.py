"""Times of the cuts of a real student, predicted from a device whose costs are known."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.predict_stages import (
    CONFIG_NAME,
    fast_and_slow,
    load_stage_times,
    predicted_stage_times,
    prediction_headings,
    prefix_cost,
)
from edgeclip.profiles.predict.tower_shapes import (
    ConvTower,
    TowerBlock,
    TransformerTower,
)
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.planning.cut_set import CUTS_NAME, CutSet
from edgeclip.runtime.planning.stage_times import SplitStage, StageTimes
from edgeclip.runtime.spec import Precision
from tests.profiles.predict.known_device import known_device, law
from tests.runtime.conftest import EMOJI_BUNDLE

CONFIG = EMOJI_BUNDLE / CONFIG_NAME
STUDENT = TransformerTower(
    part="image", width=128, heads=2, hidden=512, layers=4, tokens=65, dim=256, patch=8
)
CONV = ConvTower(widths=(32, 64), depths=(2, 1), image_size=64, dim=256)


def sealed(root: Path, *, with_config: bool) -> CutSet:
    """Add the student's configuration to a cut set, or take it away."""
    (root / CONFIG_NAME).unlink(missing_ok=True)
    index = json.loads((root / CUTS_NAME).read_text())
    files = [item for item in index["files"] if item["path"] != CONFIG_NAME]
    if with_config:
        path = Path(shutil.copyfile(CONFIG, root / CONFIG_NAME))
        size = path.stat().st_size
        files.append({"path": CONFIG_NAME, "bytes": size, "sha256": sha256_file(path)})
    (root / CUTS_NAME).write_text(json.dumps({**index, "files": files}))
    return CutSet.open(root)


@pytest.fixture(scope="module")
def cuts(emoji_cuts: CutSet, tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    root = shutil.copytree(emoji_cuts.path, tmp_path_factory.mktemp("config") / "cuts")
    return sealed(root, with_config=True)


def median(times: StageTimes, kind: Any, cut: int | None = None, codec: str | None = None) -> float:
    return float(np.median(times.ms(SplitStage(kind=kind, cut=cut, codec=codec))))


def test_more_and_more_of_a_tower_lies_before_its_cuts(emoji_cuts: CutSet) -> None:
    names = [point.name for point in emoji_cuts.manifest.points[1:]]
    blocks = [prefix_cost(STUDENT, name, lambda block: 1.0) for name in names]
    assert blocks == sorted(set(blocks))
    assert blocks[0] == 1  # the stem
    assert 4 < blocks[-1] < 5  # the projection follows the last block


def test_the_blocks_of_stages_run_in_order() -> None:
    asked: list[TowerBlock] = []

    def cost(block: TowerBlock) -> float:
        asked.append(block)
        return 1.0

    assert prefix_cost(CONV, "after block 1.0", cost) == 5
    assert asked == [CONV.stem(), CONV.block(0), CONV.block(0), CONV.down(1), CONV.block(1)]
    assert prefix_cost(CONV, "before block 1.0 (2)", cost) == 4
    for name in ("after block 1", "after block 2.0", "cut 3", "pixels"):
        with pytest.raises(InputError, match="tells no place in this tower of 3 blocks"):
            prefix_cost(CONV, name, cost)


def test_heads_and_tails_are_sums_of_blocks(cuts: CutSet, emoji_times: StageTimes) -> None:
    measured = known_device()
    found = predicted_stage_times(measured, cuts, emoji_times)
    precision: Precision = cuts.manifest.precision
    whole = Predictor(measured).predict(STUDENT, precision)
    assert median(found, "tail", 0) == pytest.approx(whole.ms)
    towers = [item for item in emoji_times.stages if item.stage.kind in ("head", "tail")]
    shortest = min(np.median(item.ms) for item in towers)
    least = shortest * whole.ms / median(emoji_times, "tail", 0)  # a run costs something by itself
    for number in cuts.numbers[1:]:
        head, tail = median(found, "head", number), median(found, "tail", number)
        assert min(head, tail) > 0.999 * least
        if min(head, tail) > 1.001 * least:
            assert head + tail == pytest.approx(whole.ms)
    assert median(found, "tail", 9) == pytest.approx(least)
    after_first = law(STUDENT.stem(), precision) + law(STUDENT.block(), precision)
    assert cuts.point(3).name == "after block 0"
    assert median(found, "head", 3) == pytest.approx(after_first, rel=0.03)
    assert found.predicted is not None
    assert found.predicted.within == pytest.approx(whole.high / whole.ms - 1)
    assert found.predicted.level == whole.level == 9 / 10
    assert (found.device, found.machine.cpu) == ("known", "Known CPU")


def test_pictures_and_codecs_are_assumed_to_slow_down_like_the_tower(
    cuts: CutSet, emoji_times: StageTimes
) -> None:
    def slow(block: TowerBlock, precision: Precision) -> float:
        return 50 * law(block, precision)

    found = predicted_stage_times(known_device(slow), cuts, emoji_times)
    factor = median(found, "tail", 0) / median(emoji_times, "tail", 0)
    for kind, cut, codec in (
        ("prepare", None, None),
        ("encode", 4, "int8"),
        ("open", None, "file"),
    ):
        was = median(emoji_times, kind, cut, codec)
        assert median(found, kind, cut, codec) == pytest.approx(factor * was)
    assert found.predicted is not None
    assert found.predicted.others_factor == pytest.approx(factor)
    assert found.payloads == emoji_times.payloads
    on_gpu = dataclasses.replace(emoji_times, on_cpu=False)
    same = predicted_stage_times(known_device(slow), cuts, on_gpu)
    assert median(same, "prepare") == pytest.approx(median(emoji_times, "prepare"))
    assert median(same, "tail", 0) == pytest.approx(median(found, "tail", 0))


def test_towers_can_be_as_fast_or_slow_as_is_allowed(cuts: CutSet, emoji_times: StageTimes) -> None:
    found = predicted_stage_times(known_device(off=0.2), cuts, emoji_times)
    fast, slow = fast_and_slow(found)
    whole = Predictor(known_device(off=0.2)).predict(STUDENT, cuts.manifest.precision)
    assert median(slow, "tail", 0) == pytest.approx(whole.high)
    assert median(fast, "head", 3) < median(found, "head", 3) < median(slow, "head", 3)
    assert median(fast, "prepare") == median(slow, "prepare")
    assert fast_and_slow(emoji_times) == ()


def test_without_a_whole_tower_there_is_no_bound(cuts: CutSet, emoji_times: StageTimes) -> None:
    bare = dataclasses.replace(known_device(), checks=())
    found = predicted_stage_times(bare, cuts, emoji_times)
    assert found.predicted is not None
    assert (found.predicted.within, found.predicted.level) == (None, None)
    assert fast_and_slow(found) == ()
    assert prediction_headings((found, emoji_times))[0].endswith("without a bound")


def test_what_the_device_cannot_run_is_refused(cuts: CutSet, emoji_times: StageTimes) -> None:
    measured = known_device()
    other = dataclasses.replace(measured.device, precisions=("fp16",), name="other")
    with pytest.raises(InputError, match="which device 'known' does not allow"):
        predicted_stage_times(dataclasses.replace(measured, device=other), cuts, emoji_times)
    with pytest.raises(InputError, match="measure the same cut set on both sides"):
        predicted_stage_times(measured, cuts, dataclasses.replace(emoji_times, bundle="another"))


def test_a_cut_set_that_does_not_tell_its_sizes_is_refused(
    emoji_cuts: CutSet, emoji_times: StageTimes, tmp_path: Path
) -> None:
    bare = sealed(shutil.copytree(emoji_cuts.path, tmp_path / "cuts"), with_config=False)
    with pytest.raises(InputError, match=r"holds no config\.json.*: cut the bundle again"):
        predicted_stage_times(known_device(), bare, emoji_times)


def test_each_side_may_be_predicted_but_not_both(
    cuts: CutSet, emoji_times: StageTimes, tmp_path: Path
) -> None:
    times, probes = str(tmp_path / "times.json"), str(tmp_path / "known.json")
    emoji_times.save(Path(times))
    known_device().save(Path(probes))
    assert load_stage_times(times, times, cuts) == (emoji_times, emoji_times)
    assert prediction_headings((emoji_times, emoji_times)) == []
    for at, sides in enumerate(
        (load_stage_times(probes, times, cuts), load_stage_times(times, probes, cuts))
    ):
        assert [side.predicted is None for side in sides] == [at == 1, at == 0]
        assert prediction_headings(sides)[0].startswith(
            f"{('device', 'server')[at]}: towers predicted"
        )
    with pytest.raises(InputError, match="nothing of pictures, codecs and the bytes that cross"):
        load_stage_times(probes, probes, cuts)
    with pytest.raises(ConfigError, match="no measured device is named 'knwon'"):
        load_stage_times("knwon", times, cuts)
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json"):
        load_stage_times(times, str(tmp_path / "none.json"), cuts)
