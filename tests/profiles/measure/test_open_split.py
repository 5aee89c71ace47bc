"""A bundle on the device, and its own models behind a server that can misbehave."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.profiles.measure.open_subject import open_subject
from edgeclip.profiles.measure.subject import SplitSpec, SubjectSpec
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import EngineError, InputError, MissingExtraError
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.serving.bundle_models import CutTail
from tests.conftest import SPACE
from tests.runtime.conftest import EMOJI_BUNDLE
from tests.runtime.serving.models_of_bundle import AMPLE_MS, answer_by, plan
from tests.runtime.split import raw_server
from tests.runtime.split.raw_server import RawServer, refusing_address, serving


def spec_of(
    bundle: Path, device: DeviceProfile, made: SplitPlan, folder: Path, **split: Any
) -> SubjectSpec:
    path = folder / "plan.json"
    made.save(path)
    return SubjectSpec(
        name=made.name,
        part="split",
        device=device,
        bundle=str(bundle),
        pictures=(),
        split=SplitSpec(plan=str(path), **split),
    )


def test_the_server_embeds(
    tiny_bundle: Path, cpu_device: DeviceProfile, encoder: Encoder, raw: RawServer, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("a-long-token\n", encoding="utf-8")
    spec = spec_of(
        tiny_bundle,
        cpu_device,
        plan(deadline_ms=AMPLE_MS),
        tmp_path,
        server=raw.url,
        token_file=str(token),
    )
    with open_subject(spec) as subject:
        batch = subject.target.make_batch(2)
        found = np.asarray(subject.target.run(batch))
        assert subject.remarks() == ()
    np.testing.assert_allclose(found, encoder.encode_image(list(batch)), atol=1e-6)
    assert raw.requests[-1].inputs["images"].tolist() == batch.tolist()
    assert raw.heads[-1]["authorization"] == "Bearer a-long-token"
    identity = subject.identity
    assert identity.provider == f"CPUExecutionProvider and tiny-image at {raw.url}"
    assert (identity.precision, identity.input_shape) == ("int8", (1, 480, 640, 3))


def test_answers_of_the_device_are_counted(
    tiny_bundle: Path, cpu_device: DeviceProfile, raw: RawServer, tmp_path: Path
) -> None:
    spec = spec_of(tiny_bundle, cpu_device, plan(), tmp_path, server=raw.url)
    with open_subject(spec) as subject:
        raw.behave = raw_server.status(404)
        for _ in range(2):
            subject.target.run(subject.target.make_batch(1))
        ((key, text),) = subject.remarks()
    assert key == "server"
    assert text.startswith("2 of 2 answers are the device's own: ")
    assert "by refused" in text


def test_a_server_that_is_away(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    spec = spec_of(tiny_bundle, cpu_device, plan(), tmp_path, server=refusing_address())
    with pytest.raises(EngineError, match=r"server at http.*gave no answer \(unreachable\)"):
        open_subject(spec)
    spec = spec_of(tiny_bundle, cpu_device, plan(), tmp_path)
    with pytest.raises(InputError, match="needs a server: give its address"):
        open_subject(spec)
    spec = spec_of(
        tiny_bundle, cpu_device, plan(), tmp_path, server="http://x", token_file=str(tmp_path / "n")
    )
    with pytest.raises(InputError, match="cannot read the token"):
        open_subject(spec)


def test_without_the_extra_it_says_what_to_install(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_bundle, cpu_device, plan(), tmp_path, server="http://127.0.0.1:1")
    for name in [name for name in sys.modules if name.startswith("edgeclip.runtime.split.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(MissingExtraError, match=r"'urllib3': pip install 'edgeclip\[split\]'"):
        open_subject(spec)


def test_a_plan_that_asks_nobody(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    made = SplitPlan(name="alone", kind="device", space=SPACE)
    with open_subject(spec_of(tiny_bundle, cpu_device, made, tmp_path)) as subject:
        found = np.asarray(subject.target.run(subject.target.make_batch(2)))
        assert found.shape == (2, 8)
        assert subject.remarks() == ()
        assert subject.identity.provider == "CPUExecutionProvider"


def test_head_and_weights_of_a_cut_count(
    emoji_cuts: CutSet, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    number = emoji_cuts.numbers[1]
    tail = CutTail(emoji_cuts, number, cpu_device)
    made = SplitPlan(
        name="cut",
        kind="cut",
        space=emoji_cuts.manifest.space,
        model=tail.name,
        codec="fp32",
        cut=number,
        deadline_ms=AMPLE_MS,
    )
    with serving(RawServer(answer=answer_by({tail.name: tail}))) as raw:
        spec = spec_of(
            EMOJI_BUNDLE,
            cpu_device,
            made,
            tmp_path,
            server=raw.url,
            cuts=str(emoji_cuts.path),
        )
        with open_subject(spec) as subject:
            subject.target.run(subject.target.make_batch(1))
            assert subject.remarks() == ()
    tower = Bundle.open(EMOJI_BUNDLE).tower_path("image", subject.identity.precision)
    files = (emoji_cuts.path / name for name in (f"head_{number}.onnx", "weights.onnx_data"))
    assert subject.identity.bytes_on_disk == sum(file.stat().st_size for file in (tower, *files))
