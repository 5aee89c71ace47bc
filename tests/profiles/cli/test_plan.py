"""`edgeclip measure-cuts` and `edgeclip plan`, as a user types them."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from edgeclip.profiles.cli import measure_cuts as measure_cuts_command
from edgeclip.profiles.cli import plan as plan_command
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile, device_yaml
from edgeclip.runtime.errors import EdgeClipError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.planning.stage_times import StageTimes
from tests.cut_sets import write_cut_set
from tests.profiles.predict.known_device import known_device
from tests.profiles.predict.test_predict_stages import sealed

pytestmark = pytest.mark.slow


def run(command: ModuleType, *words: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="edgeclip")
    command.add_arguments(parser)
    name = command.__name__.rpartition(".")[2].replace("_", "-")
    typed = argparse.Namespace(command=f"edgeclip {name}")
    status: int = command.run(parser.parse_args([str(word) for word in words], typed))
    return status


@pytest.fixture(scope="module")
def cuts(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "cuts"
    write_cut_set(Bundle.open(tiny_bundle), out, device=cpu_device, count=3)
    return out


@pytest.fixture(scope="module")
def times(cuts: Path, cpu_device: DeviceProfile) -> Path:
    device, out = cuts.parent / "device.yaml", cuts.parent / "times.json"
    device.write_text(device_yaml(cpu_device))
    assert run(measure_cuts_command, cuts, "--out", out, "--rounds", "10", "--device", device) == 0
    return out


def plan(cuts: Path, times: Path, *more: str | Path) -> int:
    common = ("--device-times", times, "--server-times", times, "--link", "wifi")
    return run(plan_command, cuts, *common, *more)


def test_times_say_where_they_come_from(times: Path) -> None:
    found = StageTimes.load(times)
    assert found.device == "test-cpu"
    assert found.bundle == "tiny"
    assert found.command.startswith("edgeclip measure-cuts")
    assert (found.rounds, found.pictures) == (10, 3)


def test_plan_is_printed_written_and_drawn(
    cuts: Path, times: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    assert plan(cuts, times, "--out", out, "--picture", picture, "--deadline-ms", "500") == 0
    printed = capsys.readouterr().out
    assert "Chosen: device only" in printed  # a tower of one product, and 20 ms of Wi-Fi
    assert "both are assumed until they are measured" in printed
    assert "Too few for a 95th percentile: 10 measured rounds" in printed
    assert "No wait for the server is assumed" in printed
    chosen = SplitPlan.load(out)
    assert (chosen.kind, chosen.deadline_ms) == ("device", 500.0)
    assert picture.read_text().startswith("<svg ")
    page = tmp_path / "plan.html"
    assert plan(cuts, times, "--picture", page, "--all", "--goal", "search") == 0
    assert "<svg " in page.read_text()
    assert "send the embedding" in capsys.readouterr().out
    assert plan(cuts, times, "--utilisation", "0.3") == 0
    assert "one worker and requests at random times (M/G/1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--link", "wifj"), "did you mean 'wifi'"),
        (("--utilisation", "1"), "utilisation must be at least 0 and below 1"),
        (("--load", "0"), "load must be above 0"),
        (("--deadline-ms", "-1"), "deadline_ms must be above 0"),
        (("--http-ms", "-1"), "http_ms must be at least 0"),
        (("--picture", "plan.png"), "ends in .svg or .html"),
        (("--device-times", "none.json"), "cannot read none.json"),
    ],
)
def test_mistakes_are_one_clear_message(
    cuts: Path, times: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(EdgeClipError) as caught:
        plan(cuts, times, *more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_times_of_another_bundle_are_refused(cuts: Path, times: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(times.read_text()), "bundle": "another"}))
    with pytest.raises(EdgeClipError, match="measure the same cut set on both sides"):
        plan(cuts, times, "--server-times", other)


def test_measuring_needs_pictures(cuts: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeClipError, match="does not exist"):
        run(measure_cuts_command, cuts, "--out", tmp_path / "t.json", "--pictures", tmp_path / "no")


def test_predictions_are_held_against_what_was_measured(
    cuts: Path, times: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.profiles.report.profile_factory import quiet_run

    out = tmp_path / "plan.json"
    assert plan(cuts, times, "--out", out) == 0
    predicted = SplitPlan.load(out)
    measured = quiet_run()
    split = replace(measured.measurements[0], part="split", name=predicted.name)
    replace(measured, measurements=(split,)).save(tmp_path / "run.json")
    capsys.readouterr()
    assert plan(cuts, times, "--measured", tmp_path / "run.json") == 0
    assert predicted.p95_ms is not None
    assert split.latency.p95_ms is not None
    error = predicted.p95_ms / split.latency.p95_ms.value - 1
    assert f"{predicted.name}: predicted p95" in (told := capsys.readouterr().out)
    assert f"error {error:+.1%}" in told
    replace(measured, measurements=(replace(split, name="other"),)).save(tmp_path / "other.json")
    with pytest.raises(EdgeClipError, match="measured none of these plans"):
        plan(cuts, times, "--measured", tmp_path / "other.json")


def test_a_side_may_be_predicted_from_probes(
    tmp_path: Path,
    emoji_cuts: CutSet,
    emoji_times: StageTimes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuts = sealed(shutil.copytree(emoji_cuts.path, tmp_path / "cuts"), with_config=True).path
    times, probes = tmp_path / "times.json", tmp_path / "board.json"
    emoji_times.save(times)
    known_device(name="board", off=0.1).save(probes)
    page = tmp_path / "plan.html"
    assert plan(cuts, times, "--device-times", probes, "--picture", page) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("device: towers predicted for board, within 1")
    assert "not measured there, but predicted: sum of block costs fitted to what was" in printed
    assert "Pictures and codecs are assumed to take" in printed
    assert "as on test-cpu, as the whole tower does" in printed
    assert "these towers" in printed  # whether the choice holds
    assert "but predicted" in page.read_text()
    with pytest.raises(EdgeClipError, match="probes tell nothing of pictures"):
        plan(cuts, probes)
