import base64
import dataclasses
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.profiles.record.conditions import CpuTime
from edgeclip.profiles.record.measurement import (
    ColdStart,
    Latency,
    Measurement,
    PairedRatio,
    SweepPoint,
    WarmUp,
)
from edgeclip.profiles.report.bundle_report import (
    DirectionQuality,
    Headline,
    ModelQuality,
    ParetoPoint,
    ReportData,
    Role,
    RunStep,
    ShippedPrecision,
    bundle_page,
)
from edgeclip.profiles.report.charts import TrainingCurve
from edgeclip.profiles.report.sections import GalleryEntry, ShownAnswer
from edgeclip.profiles.report.write_page import data_uri, html_of, markdown_of, write_html
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval
from tests.page import Page, visible

HOSTILE = '<script>alert("x")</script> & "quotes" \'single\''
MODELS: tuple[tuple[str, Role, float, float, int], ...] = (
    ("teacher (torch)", "teacher", 0.874, 9.6, 28_400_000),
    ("teacher (ONNX)", "teacher", 0.874, 6.9, 28_500_000),
    ("student fp32", "student", 0.849, 2.3, 7_420_000),
    ("student fp16", "student", 0.849, 2.4, 3_730_000),
    ("student int8", "student", 0.843, 1.62, 1_980_000),
)


def around(value: float, share: float) -> Interval:
    return Interval(value, value * (1 - share), value * (1 + share))


def measurement(name: str, tower: Tower, ms: float, size: int) -> Measurement:
    cpu = CpuTime(
        wall_s=ms / 10, thread_s=ms / 10, process_s=ms / 5, waiting_share=0.02, steal_share=0.01
    )
    ratio = PairedRatio(reference="teacher (ONNX)", ratio=around(ms / 6.9, 0.015))
    return Measurement(
        name=name,
        part=tower,
        input_shape=(1, 3, 64, 64),
        warm_up=WarmUp(runs=12, settled=True),
        latency=Latency(
            runs=100,
            p50_ms=around(ms, 0.01),
            p90_ms=around(ms * 1.1, 0.03),
            p95_ms=around(ms * 1.2, 0.05),
            p99_ms=around(ms * 1.4, 0.12),
            p99_9_ms=None,
        ),
        ratio=None if name == "teacher (ONNX)" else ratio,
        sweep=tuple(
            SweepPoint(
                batch=size,
                threads=2,
                items_per_s=around(1000 / ms * math.sqrt(size), 0.02),
                p50_ms=around(ms * math.sqrt(size), 0.02),
            )
            for size in (1, 8, 32)
        ),
        cpu=cpu,
        contended=name == "teacher (torch)",
        cold_start=None
        if "torch" in name
        else ColdStart(
            processes=3,
            import_ms=212.0,
            load_ms=ms * 6,
            first_run_ms=ms * 2.2,
            peak_memory_mb=None if name == "student fp16" else 71 + 2.1 * size / 1e6,
            file_bytes=size,
        ),
    )


def quality(name: str, role: Role, r1: float) -> ModelQuality:
    there = DirectionQuality(
        r1=around(r1, 0.022), r5=0.991, r10=0.998, median_rank=1.0, mean_rank=1.42
    )
    back = dataclasses.replace(there, r1=around(r1 - 0.004, 0.024), mean_rank=1.51)
    return ModelQuality(name=name, role=role, image_to_text=there, text_to_image=back)


def scenes() -> list[tuple[Image.Image, str]]:
    """Real pictures where the emoji packages are installed, plain ones elsewhere."""
    try:
        from edgeclip.compress.data.emoji_scenes import EmojiScenes

        found = EmojiScenes("test").distinct(12)
        return [(EmojiScenes.render(scene, 192), scene.caption) for scene in found]
    except Exception:  # the runtime's tests also run without the extra `scenes`
        return [
            (Image.new("RGB", (192, 192), (20 * i, 90, 140)), f"shape {i} on a plain background")
            for i in range(12)
        ]


def gallery(pictures: list[tuple[Image.Image, str]], wrong: bool) -> tuple[GalleryEntry, ...]:
    captions = [caption for _, caption in pictures]
    entries = []
    for at, (picture, caption) in enumerate(pictures):
        others = [captions[(at + k) % len(captions)] for k in (1, 2)]
        right = ShownAnswer(caption, 0.81, True)
        lures = [ShownAnswer(other, 0.11 - 0.05 * k, False) for k, other in enumerate(others)]
        student = (lures[0], right, lures[1]) if wrong else (right, *lures)
        entries.append(
            GalleryEntry(picture=picture, caption=caption, teacher=(right, *lures), student=student)
        )
    return tuple(entries)


def gates() -> tuple[tuple[str, GateRecord], ...]:
    found = []
    for subject, mean, low in (
        ("image fp16", 0.99998, 0.9998),
        ("image int8", 0.9951, 0.9872),
        ("text fp16", 0.99999, 0.9999),
        ("text int8", 0.9962, 0.9913),
    ):
        for name, value, bound in (("mean cosine", mean, 0.99), ("1% cosine", low, 0.98)):
            record = GateRecord(
                name=name,
                value=value,
                low=value - 0.0008,
                high=min(1.0, value + 0.0008),
                bound=bound,
                direction=">=",
                unit="",
                outcome="passed",
            )
            found.append((subject, record))
    change = GateRecord(
        name="R@1 lost", value=0.6, low=-0.4, high=1.5, bound=1.0, direction="<=", unit="points",
        outcome="undecided",
    )  # fmt: skip
    return (*found, ("bundle", change))


def render(data: ReportData) -> str:
    return html_of(bundle_page(data))


def sample() -> ReportData:
    steps = tuple(range(10, 6010, 10))
    noise = np.random.default_rng(0).normal(0, 0.04, len(steps))
    fall = np.exp(-np.array(steps) / 1200)
    curves = {
        "total": 6.1 * fall + 0.9 + noise,
        "affinity KL": 1.9 * fall + 0.2 + noise / 4,
        "feature 5(1 - cos)": 4.2 * fall**1.5 + 0.03 + np.abs(noise) / 90,
        "learning rate": 1e-3 * np.cos(np.array(steps) / 4000),
    }
    pictures = scenes()
    return ReportData(
        title="emoji-small: a student of emoji-vit",
        summary="A 1.8 M-parameter student distilled from the built-in 7.1 M-parameter teacher on "
        "EmojiScenes, measured on 1,000 unseen test scenes.",
        created="2026-11-21T09:40:00+00:00",
        headlines=(
            Headline(
                name="Quality kept, of the teacher's R@1",
                value=Interval(0.9645, 0.951, 0.978),
                bar=0.95,
                direction=">=",
                note="Mean of both directions, int8 student.",
            ),
            Headline(
                name="Latency, of the teacher's",
                value=Interval(0.235, 0.231, 0.2396),
                bar=0.32,
                direction="<=",
                note="ONNX Runtime at batch 1, both image towers.",
            ),
        ),
        choices=(
            ShippedPrecision("image", "int8", "Passes every gate and takes 0.70 of fp32."),
            ShippedPrecision("text", "fp32", "int8 passes its gates, but is not faster here."),
        ),
        steps=(
            RunStep("teacher cache", 41.2),
            RunStep("distillation", 262.0),
            RunStep("export and gates", 38.4),
            RunStep("measurement", 55.0),
        ),
        quality=tuple(
            quality(name, role, r1) for name, role, r1, _, _ in MODELS if "torch" not in name
        ),
        measurements=(
            *(measurement(name, "image", ms, size) for name, _, _, ms, size in MODELS),
            *(measurement(n, "text", ms / 4, size // 3) for n, _, _, ms, size in MODELS),
        ),
        pareto=tuple(
            ParetoPoint(
                name=name,
                role=role,
                quality=around(r1, 0.015),
                latency_ms=around(ms, 0.02),
                bytes=size,
                chosen="int8" in name,
            )
            for name, role, r1, ms, size in MODELS
        ),
        quality_name="R@1, mean of both directions",
        latency_name="image tower, batch 1",
        quality_bar=0.95 * 0.874,
        losses=tuple(
            TrainingCurve(name, steps, tuple(map(float, values))) for name, values in curves.items()
        ),
        gates=gates(),
        gallery=gallery(pictures[:9], wrong=False),
        failures=gallery(pictures[9:], wrong=True),
        machine=Machine(
            cpu="Example CPU @ 2.50GHz",
            cores=2,
            flags=("avx2", "fma", "avx512f"),
            memory_mb=8123,
            os="Linux 6.1.0",
            python="CPython 3.11.9",
            packages=(("edgeclip", "0.1.0"), ("numpy", "2.4.6"), ("onnxruntime", "1.31.1")),
        ),
        commands=(
            "edgeclip demo --out runs/demo",
            "edgeclip profile runs/demo/bundle --out m.json",
        ),
        credits=(
            "Emoji by OpenMoji, CC BY-SA 4.0.",
            "EdgeCLIP is licensed under Apache-2.0; so are the weights trained by it.",
        ),
    )


def test_page_is_well_formed_and_needs_no_network() -> None:
    html = render(sample())
    page = Page(html)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in html.replace("url(#", "")
    assert "@import" not in html


def test_shows_every_part() -> None:
    text = visible(render(sample()))
    for wanted in (
        "Meets both bars.",
        "96.5%",
        "95.1 to 97.8%",
        "23.5%",
        "Passes every gate and takes 0.70 of fp32.",
        "teacher (torch)",
        "contended",
        "unavailable",
        "≥ 0.99",
        "0.99998",
        "affinity KL",
        "Student: wrong",
        "4 min 22 s",
        "6 min 37 s",  # all steps together
        "Example CPU @ 2.50GHz",
        "edgeclip demo --out runs/demo",
        "Emoji by OpenMoji, CC BY-SA 4.0.",
    ):
        assert wanted in text, wanted


def test_the_markdown_tells_the_same() -> None:
    text = markdown_of(bundle_page(sample()))
    for wanted in ("Meets both bars.", "96.5%", "0.99998", "affinity KL", "4 min 22 s", "1.62 ms"):
        assert wanted in text, wanted


def test_verdict_names_a_missed_bar_and_a_failed_gate() -> None:
    data = sample()
    missed = dataclasses.replace(data.headlines[0], value=Interval(0.94, 0.92, 0.96))
    record = dataclasses.replace(data.gates[0][1], value=0.9, low=0.89, high=0.91, outcome="failed")
    text = visible(
        render(
            dataclasses.replace(
                data,
                headlines=(missed, data.headlines[1]),
                gates=(("image fp16", record), *data.gates[1:]),
            )
        )
    )
    assert "Misses 1 of 2 bars: Quality kept, of the teacher's R@1." in text
    assert "1 of 9 gates failed." in text
    assert "missed, but the interval reaches across the bar" in text
    assert "Meets" not in text


@pytest.mark.parametrize(
    ("direction", "low", "high", "passed", "certain"),
    [(">=", 0.51, 0.6, True, True), (">=", 0.4, 0.6, True, False), ("<=", 0.51, 0.6, False, True)],
)
def test_headline_judges_value_and_interval(
    direction: str, low: float, high: float, passed: bool, certain: bool
) -> None:
    headline = Headline(
        name="x",
        value=Interval(0.55, low, high),
        bar=0.5,
        direction=">=" if direction == ">=" else "<=",
    )
    assert (headline.passed, headline.certain) == (passed, certain)


def test_escapes_everything_given() -> None:
    data = sample()
    answer = ShownAnswer(HOSTILE, 0.5, False)
    entry = dataclasses.replace(
        data.gallery[0], caption=HOSTILE, teacher=(answer,), student=(answer,)
    )
    html = render(
        dataclasses.replace(
            data,
            title=HOSTILE,
            summary=HOSTILE,
            commands=(HOSTILE,),
            credits=(HOSTILE,),
            gallery=(entry,),
            headlines=(dataclasses.replace(data.headlines[0], name=HOSTILE, note=HOSTILE),),
            choices=(ShippedPrecision("image", "int8", HOSTILE),),
            steps=(RunStep(HOSTILE, 1.0),),
            losses=(TrainingCurve(HOSTILE, (1.0, 2.0), (3.0, 2.0)),),
            gates=((HOSTILE, dataclasses.replace(data.gates[0][1], name=HOSTILE)),),
            pareto=(dataclasses.replace(data.pareto[0], name=HOSTILE[:24]),),
            quality=(dataclasses.replace(data.quality[0], name=HOSTILE),),
            measurements=(dataclasses.replace(data.measurements[0], name=HOSTILE),),
            machine=dataclasses.replace(data.machine, cpu=HOSTILE),
            quality_name=HOSTILE,
            latency_name=HOSTILE,
        )
    )
    assert "<script" not in html.lower()
    assert Page(html).open == []
    assert visible(html).count(HOSTILE) >= 16


def test_a_page_with_nothing_to_show_leaves_the_parts_out() -> None:
    empty = dataclasses.replace(
        sample(),
        headlines=(),
        choices=(),
        steps=(),
        quality=(),
        measurements=(),
        pareto=(),
        losses=(),
        gates=(),
        gallery=(),
        failures=(),
        commands=(),
        credits=(),
    )
    html = render(empty)
    text = visible(html)
    assert "How to repeat it" in text
    assert "nan" not in text.lower()
    assert "svg" not in Page(html).tags
    for heading in ("Gates", "Gallery", "Failures", "Training", "Cold start", "Quality against"):
        assert heading not in text


def test_writes_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "report.html"
    write_html(bundle_page(sample()), path)
    before = path.read_bytes()
    assert before.endswith(b"</html>")
    broken = dataclasses.replace(sample().gallery[0], picture=b"not a picture")
    with pytest.raises(InputError, match="picture"):
        write_html(bundle_page(dataclasses.replace(sample(), gallery=(broken,))), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_writes_a_caption_that_utf8_cannot_hold(tmp_path: Path) -> None:
    entry = dataclasses.replace(sample().gallery[0], caption="caf\udce9")
    data = dataclasses.replace(sample(), gallery=(entry,))
    write_html(bundle_page(data), tmp_path / "report.html")
    assert "caf?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pictures_are_embedded_small_and_whole() -> None:
    uri = data_uri(Image.new("RGBA", (2000, 500), (255, 0, 0, 255)))
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    png = base64.b64decode(body)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (256, 64)
        assert picture.convert("RGB").getpixel((128, 32)) == (255, 0, 0)
    assert data_uri(png) == uri


def test_data_uri_leaves_the_caller_s_picture_alone() -> None:
    picture = Image.new("RGB", (600, 600))
    data_uri(picture)
    assert picture.size == (600, 600)


def test_loss_curve_needs_a_value_for_each_step() -> None:
    with pytest.raises(ValueError, match="2 steps but 1 values"):
        TrainingCurve("loss", (1.0, 2.0), (0.5,))


def test_missing_jinja_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"edgeclip\[report\]"):
        render(sample())
