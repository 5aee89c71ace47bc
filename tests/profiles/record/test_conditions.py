import pytest

from edgeclip.profiles.record.conditions import CpuSnapshot, CpuTime


def spent(
    thread: float = 1.0,
    process: float = 1.0,
    waiting: float | None = 0.0,
    steal: float | None = 0.0,
) -> CpuTime:
    return CpuTime(
        wall_s=1.0,
        thread_s=thread,
        process_s=process,
        waiting_share=waiting,
        steal_share=steal,
    )


@pytest.mark.parametrize(
    ("cpu", "contended"),
    [
        (spent(), False),
        (spent(waiting=0.09, steal=0.09), False),
        (spent(waiting=0.11), True),
        (spent(steal=0.11), True),
        # Waiting time is known: a caller that sleeps while others work is no contention.
        (spent(thread=0.5, process=1.9), False),
        # Waiting time is unknown: only a single thread can be judged by its CPU time.
        (spent(waiting=None), False),
        (spent(thread=0.8, process=0.8, waiting=None), True),
        (spent(thread=0.8, process=0.8, waiting=None, steal=None), True),
        (spent(thread=0.8, process=1.9, waiting=None), None),
        (spent(thread=0.8, process=1.9, waiting=None, steal=0.2), True),
    ],
)
def test_contended(cpu: CpuTime, contended: bool | None) -> None:
    assert cpu.contended is contended


def test_denied_shares_by_hand() -> None:
    before = CpuSnapshot(process_s=2.0, waiting_s=(("1", 5.0), ("2", 1.0)), steal_ticks=(10, 1000))
    after = CpuSnapshot(
        process_s=5.0,
        waiting_s=(("1", 5.5), ("3", 0.5)),  # thread 2 ended, thread 3 is new
        steal_ticks=(30, 1200),
    )
    waiting, steal = after.denied_since(before)
    assert waiting == pytest.approx(1.0 / 4.0)
    assert steal == pytest.approx(20 / 200)


def test_unknown_stays_unknown() -> None:
    nothing = CpuSnapshot(process_s=1.0, waiting_s=None, steal_ticks=None)
    known = CpuSnapshot(process_s=2.0, waiting_s=(("1", 1.0),), steal_ticks=(0, 10))
    assert known.denied_since(nothing) == (None, None)
    assert known.denied_since(known) == (None, None)  # no time has passed


def test_snapshot_of_this_process_only_grows() -> None:
    first = CpuSnapshot.take()
    sum(range(300_000))
    second = CpuSnapshot.take()
    assert second.process_s > first.process_s
    for share in second.denied_since(first):
        assert share is None or 0 <= share <= 1
