from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, Bounds, data_record, text_clusters
from edgeclip.export.gates.judge_precisions import (
    GateInputs,
    embed_test_pairs,
    gate_inputs,
    judge_precisions,
)
from edgeclip.export.gates.zero_shot import SubsetSource, ZeroShotSet
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.to_onnx import INTERCHANGE_FORM, TowerPaths
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.bundle.manifest import DataRecord, GateRemark
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.spec import Precision, Tower

Make = Callable[..., Source]
Embeddings = dict[tuple[Tower, Precision], NDArray[np.float32]]
SPACE = "7" * 64


def rows(noise: float = 0.0, *, seed: int = 0) -> NDArray[np.float32]:
    base = np.random.default_rng(0).normal(size=(1000, 16))
    base += noise * np.random.default_rng(seed).normal(size=base.shape)
    unit: NDArray[np.float64] = base / np.linalg.norm(base, axis=1, keepdims=True)
    return unit.astype(np.float32)


def of(**noise: float) -> Embeddings:
    """Embeddings by name such as `image_int8`; fp32 is the same for both towers."""
    found: Embeddings = {("image", "fp32"): rows(), ("text", "fp32"): rows()}
    for number, (name, amount) in enumerate(noise.items(), start=1):
        tower, precision = name.split("_")
        found[tower, precision] = rows(amount, seed=number)  # type: ignore[index]
    return found


def pairs(count: int) -> DataRecord:
    return DataRecord(f"{count} pairs", count, "0" * 64)


def labelled(
    source: Source, embeddings: NDArray[np.float32], right: NDArray[np.int64] | None = None
) -> ZeroShotSet:
    """Pictures whose labels lie on the axes of the space."""
    labels = LabelSet(names=tuple("abcd"), embeddings=np.eye(4, 16, dtype=np.float32), space=SPACE)
    found = (embeddings @ labels.embeddings.T).argmax(axis=1) if right is None else right
    return ZeroShotSet(
        source=SubsetSource(source, range(len(found)), "some"), labels=labels, targets=found
    )


def test_what_is_close_to_fp32_is_kept() -> None:
    noise = {"image_fp16": 1e-4, "text_fp16": 1e-4, "image_int8": 0.03, "text_int8": 0.03}
    verdict = judge_precisions(of(**noise), DEFAULT_BOUNDS)
    assert verdict.kept == {(t, p) for t in ("image", "text") for p in ("fp16", "int8")}
    assert verdict.left_out == ()
    assert [item.record.name for item in verdict.judged if item.subject == "bundle"] == [
        "R@1 loss fp16",
        "R@1 loss int8",
    ]


def test_a_gate_that_noise_would_pass_is_told() -> None:
    noise = {
        key: np.random.default_rng(place).normal(size=value.shape).astype(np.float32)
        for place, (key, value) in enumerate(of(image_int8=1e-4).items())
    }
    noise = {
        key: value / np.linalg.norm(value, axis=1, keepdims=True) for key, value in noise.items()
    }
    noise["image", "int8"] = noise["image", "fp32"]
    remark = judge_precisions(noise, DEFAULT_BOUNDS).gate_remarks[-1]
    assert (remark.subject, remark.gate) == ("bundle", "R@1 loss")
    assert "noise would find" in remark.says


def test_one_tower_may_fail_without_the_other() -> None:
    verdict = judge_precisions(of(image_int8=0.03, text_int8=1.0), DEFAULT_BOUNDS)
    assert verdict.kept == {("image", "int8")}
    assert [line.split(" is ")[0] for line in verdict.left_out] == [
        "text int8: mean cosine",
        "text int8: 1st-percentile cosine",
        "text int8: R@1 loss fp32 images, int8 texts",
    ]
    # Nobody will run both towers in int8, so nothing is claimed of them together.
    assert not [item for item in verdict.judged if item.subject == "bundle"]


def test_each_tower_is_judged_beside_the_other_in_fp32() -> None:
    verdict = judge_precisions(of(image_int8=0.03, text_int8=0.03), DEFAULT_BOUNDS)
    names = {(item.subject, item.record.name) for item in verdict.judged}
    assert ("image int8", "R@1 loss int8 images, fp32 texts") in names
    assert ("text int8", "R@1 loss fp32 images, int8 texts") in names
    assert ("bundle", "R@1 loss int8") in names


def test_an_image_tower_that_only_agrees_with_its_own_texts_is_refused() -> None:
    # Both towers turn the space in the same way: together they lose nothing, but an index of
    # fp32 texts is of no use to such pictures.
    turned = np.roll(rows(), 1, axis=1)
    embeddings: Embeddings = {
        **of(),
        ("image", "int8"): turned,
        ("text", "int8"): turned,
    }
    loose: dict[Precision, Bounds] = {"int8": Bounds(mean_cosine=-1.0, p1_cosine=-1.0)}
    verdict = judge_precisions(embeddings, loose)
    assert verdict.kept == frozenset()
    losses = {item.subject: item.record.value for item in verdict.judged if not item.record.passed}
    assert set(losses) == {"image int8", "text int8"}
    assert min(losses.values()) > 90


def test_zero_shot_accuracy_can_refuse_what_retrieval_allows(blobs: Make) -> None:
    embeddings = of(image_int8=1e-3)
    seen = rows()
    confused = np.roll(seen, 1, axis=1)  # every picture now looks like the next label
    asked = labelled(blobs(len(seen)), seen)
    on = GateInputs(zero_shot=asked, labelled={"fp32": seen, "int8": confused})
    verdict = judge_precisions(embeddings, DEFAULT_BOUNDS, on)
    assert verdict.kept == frozenset()
    (line,) = verdict.left_out
    assert line.startswith("image int8: zero-shot top-1 loss is ")
    record = next(item.record for item in verdict.judged if "zero-shot" in item.record.name)
    assert record.low <= record.value <= record.high
    assert record.data == data_record(asked.source)
    same = GateInputs(zero_shot=asked, labelled={"fp32": seen, "int8": seen})
    assert judge_precisions(embeddings, DEFAULT_BOUNDS, same).kept == {("image", "int8")}


def test_without_labels_the_record_says_so() -> None:
    verdict = judge_precisions(of(image_fp16=1e-4, text_fp16=1e-4), DEFAULT_BOUNDS)
    assert verdict.gate_remarks == (
        GateRemark("image fp16", "zero-shot top-1 loss", "not judged: no labels"),
    )
    assert not any("zero-shot" in item.record.name for item in verdict.judged)


def some(embeddings: Embeddings, count: int) -> Embeddings:
    """The first of all embeddings."""
    return {key: value[:count] for key, value in embeddings.items()}


@pytest.mark.parametrize("count", [3, 60])
def test_what_few_pairs_cannot_decide_is_not_shipped_unless_accepted(count: int) -> None:
    embeddings, on = some(of(text_int8=1e-4), count), GateInputs(data=pairs(count))
    verdict = judge_precisions(embeddings, DEFAULT_BOUNDS, on)
    assert verdict.kept == frozenset()
    assert {item.record.outcome for item in verdict.judged} <= {"passed", "undecided"}
    percentile, loss = verdict.left_out
    assert "1st-percentile cosine is undecided" in percentile
    assert f"{count} items tell nothing of a 1st percentile, 368 do" in percentile
    assert "R@1 loss fp32 images, int8 texts is undecided" in loss
    accepted = judge_precisions(embeddings, DEFAULT_BOUNDS, on, accept_undecided=True)
    assert accepted.kept == {("text", "int8")}
    assert accepted.left_out == ()
    assert accepted.judged == verdict.judged


def test_what_failed_is_not_shipped_even_if_undecided_is_accepted() -> None:
    verdict = judge_precisions(of(text_int8=1.0), DEFAULT_BOUNDS, accept_undecided=True)
    assert verdict.kept == frozenset()


def test_several_looks_at_the_same_pairs_widen_the_intervals() -> None:
    once, thrice = (
        judge_precisions(of(text_int8=0.05), DEFAULT_BOUNDS, looks=looks).judged for looks in (1, 3)
    )
    for one, three in zip(once[1:], thrice[1:], strict=True):  # the first is of these items alone
        assert (one.record.confidence, three.record.confidence) == (0.95, 0.983333)
        assert three.record.low <= one.record.low
        assert one.record.high <= three.record.high
        assert one.record.high - one.record.low < three.record.high - three.record.low


def test_near_duplicates_count_once_where_they_are_declared() -> None:
    embeddings = {
        key: np.repeat(value[:100], 10, axis=0) for key, value in of(text_int8=0.05).items()
    }
    relevance = Relevance.of_captions([[f"picture {n // 10}"] for n in range(1000)])
    blind = judge_precisions(embeddings, DEFAULT_BOUNDS, GateInputs(relevance=relevance))
    assert blind.kept == {("text", "int8")}
    clusters = np.repeat(np.arange(100), 10)
    on = GateInputs(relevance=relevance, clusters=clusters)
    declared = judge_precisions(embeddings, DEFAULT_BOUNDS, on)
    assert declared.kept == frozenset()  # a hundred pictures tell nothing of a 1st percentile
    outcomes = {item.record.name: item.record.outcome for item in declared.judged}
    assert outcomes["1st-percentile cosine"] == "undecided"
    assert outcomes["R@1 loss fp32 images, int8 texts"] == "undecided"


def test_captions_of_a_picture_belong_together() -> None:
    relevance = Relevance.of_captions([["a", "b"], ["c"], ["d", "e"]])
    assert text_clusters(None, None) is None
    assert text_clusters(Relevance.of_pairs(3), None) is None
    np.testing.assert_array_equal(text_clusters(relevance, None), [0, 0, 1, 2, 2])
    found = text_clusters(relevance, np.array([7, 7, 9]))
    np.testing.assert_array_equal(found, [7, 7, 7, 9, 9])


def test_records_name_the_pairs(blobs: Make) -> None:
    data = data_record(blobs(200))
    verdict = judge_precisions(some(of(text_int8=1e-4), 200), DEFAULT_BOUNDS, GateInputs(data=data))
    assert {item.record.data for item in verdict.judged} == {data}
    assert (data.name, data.count) == ("200 blobs", 200)
    assert data != data_record(blobs(200, seed=1))


def test_labelled_pictures_are_embedded_by_every_image_graph(
    clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, cpu_device: DeviceProfile
) -> None:
    graphs = [
        TowerGraph("image", "fp32", clip_towers.image, INTERCHANGE_FORM.pixels),
        TowerGraph("image", "fp16", clip_towers.image, INTERCHANGE_FORM.pixels),
        TowerGraph("text", "fp32", clip_towers.text, None),
    ]
    test, others = blobs(6), blobs(5, seed=1)
    embeddings = embed_test_pairs(clip, graphs, test, cpu_device)
    right = np.array([0, 1, 2], dtype=np.int64)
    taken = labelled(test, embeddings["image", "fp32"], right)
    on = gate_inputs(clip, graphs, test, taken, embeddings, cpu_device)
    assert on.labelled is not None
    assert set(on.labelled) == {"fp32", "fp16"}
    np.testing.assert_array_equal(on.labelled["fp32"], embeddings["image", "fp32"][:3])
    strange = labelled(others, embeddings["image", "fp32"], right)
    on = gate_inputs(clip, graphs, test, strange, embeddings, cpu_device)
    assert on.labelled is not None
    assert on.labelled["fp32"].shape == (3, 16)
    assert not np.allclose(on.labelled["fp32"], embeddings["image", "fp32"][:3])
    assert gate_inputs(clip, graphs, test, None, embeddings, cpu_device).labelled is None


def test_a_tower_that_overflows_fails_without_stopping_anything() -> None:
    embeddings = of(image_fp16=1e-4, text_fp16=1e-4)
    embeddings["text", "fp16"][3] = np.nan
    verdict = judge_precisions(embeddings, DEFAULT_BOUNDS)
    assert verdict.kept == {("image", "fp16")}
    assert "usable embeddings" in verdict.left_out[0]


def test_retrieval_can_refuse_what_cosines_allow() -> None:
    loose: dict[Precision, Bounds] = {"int8": Bounds(mean_cosine=0.1, p1_cosine=-1.0)}
    verdict = judge_precisions(of(image_int8=1.0, text_int8=1.0), loose)
    assert verdict.kept == frozenset()
    assert [line.split(" is ")[0] for line in verdict.left_out] == [
        "image int8: R@1 loss int8 images, fp32 texts",
        "text int8: R@1 loss fp32 images, int8 texts",
    ]


def test_both_towers_together_can_lose_more_than_either_alone() -> None:
    bounds: dict[Precision, Bounds] = {"int8": Bounds(mean_cosine=0, p1_cosine=-1, r1_loss=25)}
    verdict = judge_precisions(of(image_int8=0.7, text_int8=0.7), bounds)
    losses = {item.subject: item.record for item in verdict.judged if "R@1" in item.record.name}
    assert losses["image int8"].passed
    assert losses["text int8"].passed
    assert not losses["bundle"].passed
    assert verdict.kept == frozenset()


def test_fp32_alone_has_nothing_to_judge() -> None:
    verdict = judge_precisions(of(), DEFAULT_BOUNDS)
    assert (verdict.judged, verdict.kept, verdict.left_out) == ((), frozenset(), ())
