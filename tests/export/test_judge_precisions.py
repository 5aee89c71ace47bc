import numpy as np
from numpy.typing import NDArray

from edgeclip.export.gates import DEFAULT_BOUNDS, Bounds
from edgeclip.export.judge_precisions import judge_precisions
from edgeclip.runtime.spec import Precision, Tower

Embeddings = dict[tuple[Tower, Precision], NDArray[np.float32]]


def rows(noise: float = 0.0, *, seed: int = 0) -> NDArray[np.float32]:
    base = np.random.default_rng(0).normal(size=(200, 16))
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


def test_what_is_close_to_fp32_is_kept() -> None:
    noise = {"image_fp16": 1e-4, "text_fp16": 1e-4, "image_int8": 0.03, "text_int8": 0.03}
    verdict = judge_precisions(of(**noise), DEFAULT_BOUNDS)
    assert verdict.kept == {(t, p) for t in ("image", "text") for p in ("fp16", "int8")}
    assert verdict.left_out == ()
    assert [item.record.name for item in verdict.judged if item.subject == "bundle"] == [
        "R@1 loss fp16",
        "R@1 loss int8",
    ]


def test_one_tower_may_fail_without_the_other() -> None:
    verdict = judge_precisions(of(image_int8=0.03, text_int8=1.0), DEFAULT_BOUNDS)
    assert verdict.kept == {("image", "int8")}
    assert len(verdict.left_out) == 2
    assert all(line.startswith("text int8: ") for line in verdict.left_out)


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
    assert len(verdict.left_out) == 1
    assert verdict.left_out[0].startswith("bundle: R@1 loss int8 is ")


def test_fp32_alone_has_nothing_to_judge() -> None:
    verdict = judge_precisions(of(), DEFAULT_BOUNDS)
    assert (verdict.judged, verdict.kept, verdict.left_out) == ((), frozenset(), ())
