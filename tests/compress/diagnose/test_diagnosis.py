from dataclasses import replace

from edgeclip.compress.diagnose.diagnosis import Diagnosis, Finding, headline, not_compared

HEALTHY = Diagnosis(
    data="pictures",
    pictures=100,
    captions=100,
    distinct=100,
    left_out="",
    outside="",
    same_space=True,
    models=(),
    towers=(),
    findings=(),
)


def test_no_fault_is_no_praise_of_what_was_not_compared() -> None:
    assert not_compared(HEALTHY) == ()
    whole = headline(HEALTHY)
    for part in (replace(HEALTHY, same_space=False), replace(HEALTHY, distinct=3)):
        assert len(not_compared(part)) == 1
        assert headline(part) != whole


def test_too_few_pictures_are_no_fault() -> None:
    few = Finding(kind="too few pictures", subject="groups", title="", evidence=(), advice="")
    assert headline(replace(HEALTHY, findings=(few,))) == headline(HEALTHY)
    faults = (few, replace(few, kind="precision"))
    assert headline(replace(HEALTHY, findings=faults)) == "1 finding"
