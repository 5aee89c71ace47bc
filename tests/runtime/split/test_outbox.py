"""Real files: what was put survives kills, other processes, full boxes and damage."""

import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.errors import OutboxError
from edgeclip.runtime.split.outbox import EntryKind, Outbox, OutboxRules
from edgeclip.runtime.wire.messages import InferRequest, WireError
from tests.runtime.conftest import Clock
from tests.runtime.split.raw_server import RawServer, serving

NOW = 1_800_000_000.0


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def outbox(tmp_path: Path, clock: Clock) -> Iterator[Outbox]:
    with Outbox(tmp_path / "folder" / "outbox.db", clock=clock) as outbox:
        yield outbox


def request(size: int = 10) -> InferRequest:
    images = np.array([bytes(size)], object)
    return InferRequest(model="T-image", inputs={"images": images}, parameters={"space_id": "5"})


def small(tmp_path: Path, *, entries: int = 1000, size: int = 1 << 20) -> Outbox:
    rules = OutboxRules(max_entries=entries, max_bytes=size)
    return Outbox(tmp_path / "small.db", rules=rules)


def drain(outbox: Outbox) -> list[str]:
    """The keys of all that waits, in order, confirmed one by one."""
    keys = []
    while (entry := outbox.oldest()) is not None:
        keys.append(entry.key)
        outbox.confirm(entry.key)
    return keys


def test_what_was_put_comes_back_in_order(outbox: Outbox) -> None:
    for key in ("b", "a", "c"):
        assert outbox.put(key, request())
    entry = outbox.oldest()
    assert entry is not None
    found = entry.request()
    assert (found.id, found.model, found.parameters) == (
        "b",
        "T-image",
        {"space_id": "5", "idempotency_key": "b"},
    )
    assert found.inputs["images"].tolist() == [bytes(10)]
    assert drain(outbox) == ["b", "a", "c"]
    assert outbox.counts().sent == 3


def test_only_the_owner_may_read_it(outbox: Outbox) -> None:
    outbox.put("a", request())
    files = list(outbox.path.parent.iterdir())
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_key_waits_once_and_is_sent_once(outbox: Outbox, clock: Clock) -> None:
    assert outbox.put("a", request())
    assert outbox.put("a", request(20))
    assert outbox.counts().escalations == 1
    assert drain(outbox) == ["a"]
    assert outbox.put("a", request())
    assert outbox.oldest() is None
    clock.now += outbox.rules.lives_s + 1
    outbox.put("a", request())
    assert drain(outbox) == ["a"]


def test_it_survives_being_opened_again(outbox: Outbox, tmp_path: Path) -> None:
    outbox.put("a", request())
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        outbox.put("b", request())
    with Outbox(outbox.path) as again:
        assert drain(again) == ["a"]


def test_old_entries_are_not_sent(outbox: Outbox, clock: Clock) -> None:
    outbox.put("old", request())
    clock.now += outbox.rules.lives_s - 1
    outbox.put("young", request())
    clock.now += 2
    assert drain(outbox) == ["young"]
    assert outbox.counts().expired == 1


def test_a_clock_that_is_set_late_makes_nothing_old(outbox: Outbox, clock: Clock) -> None:
    clock.now = 60.0
    outbox.put("a", request())
    clock.now = NOW
    assert drain(outbox) == ["a"]


def test_oldest_telemetry_goes_first(tmp_path: Path) -> None:
    with small(tmp_path, entries=3) as outbox:
        outbox.put("telemetry 1", request(), kind="telemetry")
        outbox.put("escalation 1", request())
        outbox.put("telemetry 2", request(), kind="telemetry")
        assert outbox.put("escalation 2", request())
        assert outbox.put("escalation 3", request())
        assert not outbox.put("telemetry 3", request(), kind="telemetry")
        assert outbox.put("escalation 4", request())
        counts = outbox.counts()
        assert (counts.dropped_telemetry, counts.dropped_escalations) == (3, 1)
        assert drain(outbox) == ["escalation 2", "escalation 3", "escalation 4"]


def test_bytes_are_bounded(tmp_path: Path) -> None:
    with small(tmp_path, size=10_000) as outbox:
        with pytest.raises(InputError, match="does not fit"):
            outbox.put("huge", request(10_000))
        for number in range(20):
            outbox.put(str(number), request(3000))
            assert outbox.counts().waiting_bytes <= 10_000
        assert drain(outbox) == ["17", "18", "19"]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from(["escalation", "telemetry"]), st.booleans()),
        max_size=40,
    )
)
def test_it_behaves_like_a_list(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, EntryKind, bool]]
) -> None:
    waiting: list[str] = []
    sent: list[str] = []
    with small(tmp_path_factory.mktemp("box")) as outbox:
        for number, kind, sends in steps:
            if sends and waiting:
                entry = outbox.oldest()
                assert entry is not None
                assert entry.key == waiting[0]
                outbox.confirm(entry.key)
                sent.append(waiting.pop(0))
            else:
                key = str(number)
                outbox.put(key, request(), kind=kind)
                if key not in waiting + sent:
                    waiting.append(key)
        counts = outbox.counts()
        assert counts.escalations + counts.telemetry == len(waiting)
        assert counts.sent == len(sent)


def test_failures_are_counted_until_it_is_given_up(outbox: Outbox) -> None:
    outbox.put("a", request())
    outbox.put("b", request())
    outbox.failed("a", max_failures=2)
    assert outbox.counts().escalations == 2
    outbox.failed("a", max_failures=2)
    assert drain(outbox) == ["b"]
    assert outbox.counts().refused == 1


def test_what_cannot_be_sent_is_not_kept(outbox: Outbox) -> None:
    with pytest.raises(InputError, match="key"):
        outbox.put("", request())
    with pytest.raises(WireError):
        outbox.put("a", InferRequest(model="m", inputs={"x": np.zeros(2, np.complex64)}))
    assert outbox.oldest() is None


def test_wait_ends_when_something_is_put(outbox: Outbox) -> None:
    thread = threading.Timer(0.05, lambda: outbox.put("a", request()))
    thread.start()
    outbox.wait(30)
    thread.join()
    assert outbox.oldest() is not None


def test_many_threads_and_connections_lose_nothing(tmp_path: Path) -> None:
    def fill(name: str) -> None:
        with Outbox(tmp_path / "shared.db") as outbox:
            for number in range(10):
                outbox.put(f"{name}-{number}", request())

    threads = [threading.Thread(target=fill, args=(str(name),)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Outbox(tmp_path / "shared.db") as outbox:
        keys = drain(outbox)
    assert len(keys) == 40
    for name in range(4):
        own = [key for key in keys if key.startswith(f"{name}-")]
        assert own == [f"{name}-{number}" for number in range(10)]


def damage_text(path: Path) -> None:
    path.write_text("this is no database, and it is long enough to be looked at\n" * 20)


def damage_other(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE something (else_ TEXT)")
    connection.close()


def damage_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("damage", [damage_text, damage_other, damage_folder])
def test_what_is_no_outbox_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "outbox.db"
    damage(path)
    with pytest.raises(OutboxError, match=r"outbox\.db"):
        Outbox(path)


def test_writer_that_holds_the_file_too_long_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with Outbox(path, rules=OutboxRules(busy_s=0.05)) as outbox:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutboxError, match="locked"):
            outbox.put("a", request())
        other.execute("ROLLBACK")
        other.close()
        assert outbox.put("a", request())


def test_rules_that_make_no_sense() -> None:
    with pytest.raises(InputError):
        OutboxRules(max_bytes=0)


def test_killed_again_and_again_it_loses_nothing_and_sends_nothing_twice(tmp_path: Path) -> None:
    script = Path(__file__).with_name("outbox_writer.py")
    promised: list[int] = []
    with serving(RawServer()) as server:
        for round_number in range(6):
            first = promised[-1] + 1 if promised else 0
            command = [
                sys.executable,
                str(script),
                str(tmp_path / "box.db"),
                server.url,
                str(first),
            ]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    promised.append(int(line))
                    if len(promised) >= 25 * (round_number + 1):
                        break
                # Let it be in the middle of something.
                threading.Event().wait(random.random() / 50)
                child.kill()
                promised += [int(line) for line in child.stdout if line.endswith("\n")]
        arrived = [request.id for request in server.requests]
    with Outbox(tmp_path / "box.db") as outbox:
        waiting = drain(outbox)
    assert promised == list(range(len(promised)))
    assert arrived
    assert set(arrived) | set(waiting) >= {f"key-{number}" for number in promised}
    # The server sees a key twice only where the kill came before its answer was noted.
    twice = len(arrived) - len(set(arrived))
    assert twice <= 6
    assert len(set(arrived) & set(waiting)) <= 1
    numbers = [int(key.removeprefix("key-")) for key in arrived]
    assert numbers == sorted(numbers)
