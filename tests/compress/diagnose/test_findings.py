import math
from dataclasses import replace

import numpy as np

from edgeclip.compress.data.picture_groups import Groups
from edgeclip.compress.diagnose.diagnosis import (
    Confusion,
    DiagnosedModel,
    LayerFigures,
    TowerAgreement,
    TowerLayers,
)
from edgeclip.compress.diagnose.findings import find
from edgeclip.compress.diagnose.groups import GroupQuality, group_quality
from edgeclip.compress.diagnose.reliability import Calibration
from edgeclip.compress.diagnose.similarity import MutualInformation
from edgeclip.runtime.stats.interval import Interval


def near(value: float, half: float = 0.01) -> Interval:
    return Interval(value, value - half, value + half)


def layers(*gains: float, noise: tuple[int, ...] = ()) -> TowerLayers:
    """An image tower whose cosine changes so much without each layer, and random layers."""
    return TowerLayers(
        tower="image",
        items=100,
        layers=tuple(
            LayerFigures(
                number=at,
                best=at,
                cka=near(0.9),
                cosine=None,
                noise=at in noise,
                gain_without=near(gain),
                does_harm=gain > 0.01,
            )
            for at, gain in enumerate(gains, 1)
        ),
        cka=(),
        entropy=None,
        teacher_entropy=None,
    )


AGREES = TowerAgreement(
    cosine=near(0.9),
    told_apart=near(0.99, 0.005),
    towards_mean=near(0.1),
    teacher_towards_mean=near(0.1),
    neighbours=near(0.6),
    information=MutualInformation(10.0, 0.1, 19, 0.01, 16),
)
STUDENT = DiagnosedModel(
    name="student",
    r1=near(0.95),
    kept=near(0.97),
    kept_of_exact=None,
    image=AGREES,
    text=AGREES,
    gap=near(0.1),
    alignment=near(0.2),
    image_uniformity=near(-3),
    text_uniformity=near(-3),
    calibration=Calibration(
        error=0.01,
        expected=0.01,
        limit=0.02,
        confidence_above_accuracy=near(0.0),
        temperature=1.0,
    ),
    outside=near(0.97),
    outside_lost=near(0.0),
    concepts=(),
    groups=(),
    confusions=(),
)
TEACHER = replace(STUDENT, name="teacher", kept=None, image=None, text=None, outside_lost=None)


def found(student: DiagnosedModel = STUDENT, tower: TowerLayers | None = None) -> list[str]:
    towers = [layers(-0.5, -0.1, -0.1) if tower is None else tower]
    return [f"{item.kind}: {item.subject}" for item in find([TEACHER, student], towers, [100])]


def test_a_healthy_student_has_nothing() -> None:
    assert found() == []


def test_a_layer_that_does_harm_is_named() -> None:
    assert found(tower=layers(-0.5, 0.1, -0.1)) == ["broken layer: image tower: layer 2"]


def test_what_follows_random_weights_is_not_judged() -> None:
    assert found(tower=layers(-0.1, -0.1, 0.1, noise=(1,))) == [
        "broken layer: image tower: layer 1"
    ]
    assert found(tower=layers(-0.1, -0.1, noise=(1, 2))) == []  # a tower without training


def test_a_text_tower_that_learned_the_mean_alone_had_shuffled_captions() -> None:
    lost = replace(AGREES, told_apart=near(0.55), towards_mean=near(0.4))
    assert found(replace(STUDENT, text=lost)) == ["shuffled captions: text tower"]
    never = replace(lost, towards_mean=near(0.0))
    assert found(replace(STUDENT, text=never)) == ["tower at chance: text tower"]
    unsure = replace(lost, told_apart=near(0.55, 0.3))
    assert found(replace(STUDENT, text=unsure)) == []
    both = replace(STUDENT, text=lost, image=lost)  # no other tower to compare with
    assert found(both) == []


def test_a_group_with_wrong_colours_is_named_and_one_without_is_behind() -> None:
    group = GroupQuality(
        column="background",
        name="blue",
        pictures=80,
        r1=near(0.4),
        teacher_r1=near(0.95),
        kept=near(0.4),
        behind=near(0.5, 0.1),
        is_behind=True,
    )
    confusion = Confusion(
        column="background",
        group="blue",
        word="blue",
        read_as="orange",
        pictures=60,
        share=near(0.7),
        teacher=near(0.01),
        more=near(0.69),
    )
    fine = replace(group, name="red", behind=near(0.0), is_behind=False)
    ill = replace(STUDENT, groups=(group, fine))
    assert found(ill) == ["group behind: background blue"]
    assert found(replace(ill, confusions=(confusion,))) == ["wrong colours: background blue"]
    # Retrieval may do without colours.
    kept = replace(ill, groups=(replace(group, is_behind=False), fine), confusions=(confusion,))
    assert found(kept) == ["wrong colours: background blue"]
    unsure = replace(confusion, more=near(0.05, 0.1))
    assert found(replace(ill, confusions=(unsure,))) == ["group behind: background blue"]
    # A colour that is wrong in every layout is one of a background.
    seen = [replace(confusion, column="layout", group=name) for name in ("above", "below")]
    assert found(replace(kept, confusions=(confusion, *seen))) == ["wrong colours: background blue"]
    assert found(replace(kept, confusions=tuple(seen))) == []
    # Behind a broken layer of the image tower any word is lost.
    broken = layers(-0.1, -0.1, noise=(1,))
    assert found(kept, broken) == ["broken layer: image tower: layer 1"]
    assert found(kept, replace(broken, tower="text")) == [
        "broken layer: text tower: layer 1",
        "wrong colours: background blue",
    ]


def test_a_precision_that_surely_loses_is_named() -> None:
    precision = replace(STUDENT, name="int8", kept_of_exact=near(0.95))
    (item,) = find([TEACHER, STUDENT, precision], [], [100])
    assert (item.kind, item.subject) == ("precision", "int8")
    unsure = replace(precision, kept_of_exact=near(0.95, 0.1))
    assert find([TEACHER, STUDENT, unsure], [], [100]) == ()


def test_groups_that_tell_nothing_are_counted_and_named() -> None:
    theirs = np.zeros(200)
    theirs[:80] = theirs[120] = 1  # of the last hundred, one hit
    groups = Groups("camera", ("one", "other"), np.repeat([0, 1], 100))
    judged = group_quality([groups], theirs, theirs)
    assert not all(math.isfinite(own.behind.low) for own in judged)
    (item,) = find([TEACHER, replace(STUDENT, groups=judged)], [], [100, 100])
    assert item.kind == "too few pictures"
    assert "2 groups" in item.title
    assert all(f"camera {name}" in " ".join(item.evidence) for name in groups.names)
    wide = replace(judged[0], name="third", behind=near(0.0, 0.2))
    (item,) = find([TEACHER, replace(STUDENT, groups=(*judged, wide))], [], [100] * 3)
    assert "3 groups" in item.title
    assert "1600" in item.advice  # 100 pictures tell 20 points


def test_small_groups_are_counted_with_what_would_do() -> None:
    (item,) = find([TEACHER, STUDENT], [], [100, 5])
    assert item.kind == "too few pictures"
    assert "4 times" in item.advice
