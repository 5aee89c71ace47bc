import numpy as np
import pytest

from edgeclip.compress.data.picture_groups import Groups
from edgeclip.compress.diagnose.concepts import concept_questions
from edgeclip.compress.diagnose.diagnosis import DiagnosedModel
from edgeclip.compress.diagnose.measure import Embedded, Measuring, Questions
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.quality.relevance import Relevance

RNG = np.random.default_rng(0)


def unit(rows: Values) -> Values:
    found: Values = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def embedded(name: str, image: Values, text: Values) -> Embedded:
    outside = unit(np.random.default_rng(1).normal(size=(20, image.shape[1])))
    return Embedded(name, unit(image), unit(text), outside, 20.0)


def measure(
    captions: list[str],
    *models: Embedded,
    groups: tuple[Groups, ...] = (),
    questions: Questions | None = None,
) -> list[DiagnosedModel]:
    relevance = Relevance.of_captions([(caption,) for caption in captions])
    first = np.arange(len(captions))
    names = frozenset(model.name for model in models)
    measuring = Measuring(relevance, first, groups, questions or Questions((), ()), names, 0)
    return list(measuring.qualities(models))


def of_captions(distinct: int, count: int) -> DiagnosedModel:
    """A healthy student of pictures that share so many captions."""
    of = np.arange(count) % distinct
    text = RNG.normal(size=(distinct, 16))[of]
    image = text + 0.1 * RNG.normal(size=(count, 16))
    near = embedded("student", image, text + 0.05 * RNG.normal(size=(distinct, 16))[of])
    captions = [f"caption {number}" for number in of]
    return measure(captions, embedded("teacher", image, text), near)[1]


def test_equal_captions_are_told_apart_once() -> None:
    agreement = of_captions(50, 200).text
    assert agreement is not None
    assert agreement.told_apart is not None
    assert agreement.told_apart.value == 1


def test_a_text_tower_of_few_distinct_captions_is_not_judged() -> None:
    found = of_captions(2, 60)
    assert found.text is None
    assert found.image is not None


def test_a_model_beside_itself_loses_nothing() -> None:
    image, text = RNG.normal(size=(2, 60, 8))
    captions = [f"caption {number}" for number in range(60)]
    teacher, student = measure(
        captions, embedded("teacher", image, text), embedded("student", image, text)
    )
    assert student.r1 == teacher.r1
    assert student.outside == teacher.outside
    assert student.outside_lost is not None
    assert student.outside_lost.value == 0


@pytest.mark.parametrize("errs", [False, True])
def test_a_word_is_never_read_as_itself(errs: bool) -> None:
    # The teacher reads half of all black as white, the student all alike.
    captions = ["a black cup", "a white cup"] * 40
    (asked,) = concept_questions(captions)
    axes = np.eye(2)[asked.right]
    text = np.tile(np.eye(2), (80, 1))
    confused, wrong = axes.copy(), axes.copy()
    confused[::4] = [0, 1]
    wrong[::2] = [0, 1]
    teacher = embedded("teacher", axes if errs else confused, axes)
    student = embedded("student", wrong if errs else axes, axes)
    of_all = Groups("camera", ("one",), np.zeros(80, np.int64))
    questions = Questions((asked,), (text,))
    found = measure(captions, teacher, student, groups=(of_all,), questions=questions)[1]
    told = [(item.word, item.read_as) for item in found.confusions]
    assert told == ([("black", "white")] if errs else [])


@pytest.mark.parametrize("exact", ["fp32", "student", "fp16"])
def test_precisions_are_compared_with_fp32_else_with_the_student(exact: str) -> None:
    image = np.random.default_rng(2).normal(size=(60, 8))
    broken = image.copy()
    broken[::4] = -broken[::4]  # a quarter is lost
    models = [embedded(name, image, image) for name in ("teacher", exact)]
    models.append(embedded("int8", broken, image))
    captions = [f"caption {number}" for number in range(60)]
    _, same, lost = measure(captions, *models)
    assert same.kept_of_exact is None
    if exact == "fp16":  # as inexact as the other
        assert lost.kept_of_exact is None
    else:
        assert lost.kept_of_exact is not None
        assert lost.kept_of_exact.value == pytest.approx(0.75, abs=0.01)
        assert lost.kept_of_exact.high < 1
