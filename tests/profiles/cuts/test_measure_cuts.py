import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from edgeclip.profiles.cuts.measure_cuts import StageSampler, TimedStage, measure_cuts, stage_table
from edgeclip.profiles.sensors.energy import CounterMeter, EnergyCounter
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.stage_times import SplitStage, StageTimes
from edgeclip.runtime.wire.codec import FLOAT_CODECS, IMAGE_CODECS


def test_every_stage_of_both_sides_is_measured(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    stages = {str(item.stage) for item in emoji_times.stages}
    assert len(stages) == len(emoji_times.stages)
    assert {"prepare", "tail 0", "head 9", "tail 9", "encode 4 int8-zstd"} <= stages
    assert {"compress webp-80", "open file", "encode 0 uint8", "decode 0 uint8-zstd"} <= stages
    assert "head 0" not in stages
    assert all(len(item.ms) == 12 for item in emoji_times.stages)
    cuts = len(emoji_cuts.numbers) - 1
    assert len(emoji_times.payloads) == len(IMAGE_CODECS) + 2 + cuts * len(FLOAT_CODECS)


def test_bytes_and_cosines_are_those_of_the_codec(emoji_times: StageTimes) -> None:
    found = {(item.cut, item.codec): item for item in emoji_times.payloads}
    sizes = {key: np.median(item.bytes) for key, item in found.items()}
    values = 65 * 128
    assert sizes[4, "fp32"] - 4 * values == sizes[4, "fp16"] - 2 * values
    assert values + 4 * 128 < sizes[4, "int8"] < values + 4 * 128 + 600
    assert sizes[4, "int8-zstd"] < sizes[4, "int8"]
    assert sizes[None, "jpeg-75"] < sizes[None, "jpeg-90"] < sizes[None, "file"]
    assert min(found[4, "fp32"].cosines) > 0.99999
    assert min(found[4, "int8"].cosines) > 0.99
    assert min(found[None, "file"].cosines) > 0.99999
    assert min(found[None, "jpeg-75"].cosines) < 0.99999


def test_round_trip_and_table(emoji_cuts: CutSet, emoji_times: StageTimes, tmp_path: Path) -> None:
    emoji_times.save(tmp_path / "times.json")
    assert StageTimes.load(tmp_path / "times.json") == emoji_times
    table = stage_table(emoji_times, emoji_cuts.manifest)
    assert "after block 0" in table
    assert "int8-zstd" in table


def test_other_towers_are_refused(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    emoji_times.check_same_tower(emoji_cuts.manifest, "the cut set")
    other = dataclasses.replace(emoji_cuts.manifest, precision="fp16")
    with pytest.raises(InputError, match="measure the same cut set on both sides"):
        emoji_times.check_same_tower(other, "the cut set")
    with pytest.raises(InputError, match="stage head 77 was not measured"):
        emoji_times.ms(SplitStage(kind="head", cut=77))


def test_files_that_are_none_are_refused(emoji_times: StageTimes, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    data = json.loads(emoji_times.to_json())
    for change, message in (
        ({"schema_version": 1}, "schema 1"),
        ({"rounds": 13}, "13 times"),
        ({"pictures": 0}, "there must be pictures"),
        ({"more": 1}, "unknown key"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ConfigError, match=message):
            StageTimes.load(path)
    path.write_text("no JSON")
    with pytest.raises(ConfigError, match="not JSON"):
        StageTimes.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        StageTimes.load(tmp_path / "none")


def test_stages_can_be_replaced(emoji_cuts: CutSet, cpu_device: DeviceProfile) -> None:
    stage = SplitStage(kind="prepare")

    def slower(timed: TimedStage) -> TimedStage:
        return TimedStage(stage, lambda at: time.sleep(0.05)) if timed.stage == stage else timed

    slow = measure_cuts(
        emoji_cuts, device=cpu_device, command="pytest", rounds=10, replace_stage=slower
    )
    assert min(slow.ms(stage)) >= 50


def test_too_little_to_measure_is_refused(
    emoji_cuts: CutSet, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="take 10 at least"):
        measure_cuts(emoji_cuts, device=cpu_device, command="", rounds=9)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    broken = [tmp_path / "broken.jpg"]
    with pytest.raises(InputError, match="not an image"):
        measure_cuts(emoji_cuts, device=cpu_device, command="", pictures=broken)


def test_energy_of_a_stage_is_that_of_one_run() -> None:
    runs: list[int] = []
    sampler = StageSampler([TimedStage(SplitStage(kind="prepare"), runs.append)], pictures=1)
    sampler.run_round()
    meter = CounterMeter(
        name="counter",
        covers="nothing",
        least_s=0.001,
        counters=(EnergyCounter(lambda: 7 * len(runs)),),
        per_joule=14,
    )
    (found,) = sampler.samples(meter)
    assert found.joules == pytest.approx(0.5)
    (unknown,) = sampler.samples(dataclasses.replace(meter, counters=(EnergyCounter(lambda: 5),)))
    assert unknown.joules is None
