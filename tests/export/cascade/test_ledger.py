"""Tries on the same queries: what continues, what costs, and what a damaged ledger says."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.cascade.ledger import (
    Group,
    Ledger,
    default_ledger_path,
    grant,
    item_hashes,
    take_turn,
)
from edgeclip.runtime.errors import InputError
from tests.export.cascade.simulate_certificates import HYPOTHESIS


def items(*names: str) -> list[Group]:
    return [(name,) for name in names]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


def test_more_queries_continue_the_same_bets(ledger: Path) -> None:
    first = take_turn(ledger, HYPOTHESIS, items("c", "a", "d"))
    assert (first.number, first.order) == (1, (1, 0, 2))
    more = take_turn(ledger, HYPOTHESIS, items("b", "c", "a", "d", "0"))
    assert more.number == 1
    assert more.order == (2, 1, 3, 4, 0)  # a, c, d as before, then 0, b
    assert "continues try 1" in more.words
    assert "2 more queries" in more.words
    again = take_turn(ledger, HYPOTHESIS, items("0", "a", "b", "c", "d"))
    assert again.order == (1, 3, 4, 0, 2)


def test_another_hypothesis_has_a_smaller_part(ledger: Path) -> None:
    take_turn(ledger, HYPOTHESIS, items("a", "b"))
    others = (
        replace(HYPOTHESIS, student=("z",)),
        replace(HYPOTHESIS, bound=0.9),
        replace(HYPOTHESIS, entries="x"),
        replace(HYPOTHESIS, grid="x"),
    )
    parts = [0.5 * 0.1]
    for number, other in enumerate(others, 2):
        turn = take_turn(ledger, other, items("b", "c"))
        assert turn.number == number
        parts.append(turn.part_of(0.1))
        assert f"1/{number * (number + 1)} of delta" in turn.words
    assert sum(parts) < 0.1
    assert take_turn(ledger, HYPOTHESIS, items("a", "b")).number == 1


def test_other_queries_are_another_matter(ledger: Path) -> None:
    take_turn(ledger, HYPOTHESIS, items("a", "b"))
    other = replace(HYPOTHESIS, student=("z",))
    assert take_turn(ledger, other, items("c", "d")).number == 1
    # Nobody can tell whether pictures of another size are the same ones.
    assert take_turn(ledger, replace(other, size=32), items("e")).number == 2


def test_what_was_bet_on_must_be_there_again(ledger: Path) -> None:
    take_turn(ledger, HYPOTHESIS, items("a", "b", "c"))
    assert take_turn(ledger, HYPOTHESIS, items("a", "b")).number == 2


def test_the_first_try_goes_on_after_one_with_fewer_queries(ledger: Path) -> None:
    tried = ("ab", "a", "ab", "ab", "abc")
    numbers = [take_turn(ledger, HYPOTHESIS, items(*names)).number for names in tried]
    assert numbers == [1, 2, 1, 1, 1]


def test_a_cluster_that_grew_is_another_try(ledger: Path) -> None:
    take_turn(ledger, HYPOTHESIS, [("a", "b"), ("c",)])
    assert take_turn(ledger, HYPOTHESIS, [("a", "b"), ("c",), ("d",)]).number == 1
    assert take_turn(ledger, HYPOTHESIS, [("a", "b"), ("c", "e"), ("d",)]).number == 2


def test_queries_of_another_first_try_cannot_be_joined(ledger: Path) -> None:
    other = replace(HYPOTHESIS, student=("z",))
    take_turn(ledger, HYPOTHESIS, items("a"))
    take_turn(ledger, other, items("b"))
    assert take_turn(ledger, HYPOTHESIS, items("a", "b")).number == 2


@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=6))
def test_tries_that_overlap_never_share_a_part(sets: list[set[str]]) -> None:
    ledger = Ledger()
    for number, names in enumerate(sets):
        tried = replace(HYPOTHESIS, student=(str(number % 3),))
        turn, ledger = grant(ledger, tried, items(*sorted(names)))
        assert sorted(turn.order) == list(range(len(names)))
        for at, one in enumerate(ledger.tries):
            for other in ledger.tries[:at]:
                assert not one.overlaps(other) or one.number != other.number


def test_without_a_ledger_nothing_is_remembered() -> None:
    turn = take_turn(None, HYPOTHESIS, items("b", "a"))
    assert (turn.number, turn.order, turn.part_of(0.05)) == (None, (1, 0), 0.05)
    assert "No ledger" in turn.words


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1, "tries": [1]}'])
def test_damage_is_an_error_with_a_mend(ledger: Path, text: str) -> None:
    ledger.write_text(text)
    with pytest.raises(InputError, match="put back a copy of it"):
        take_turn(ledger, HYPOTHESIS, items("a"))
    assert ledger.read_text() == text


def test_what_cannot_be_read_is_not_called_damaged(ledger: Path) -> None:
    ledger.mkdir()
    with pytest.raises(InputError, match="cannot read") as caught:
        take_turn(ledger, HYPOTHESIS, items("a"))
    assert "put back a copy" not in str(caught.value)


def test_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECLIP_STATE", str(tmp_path))
    found = default_ledger_path("emoji")
    assert found.is_relative_to(tmp_path)
    assert found == default_ledger_path("emoji=1")
    assert found != default_ledger_path("photos")
    assert default_ledger_path("photos") == default_ledger_path("moved/photos")


def test_items_are_told_apart_by_their_content() -> None:
    few, more = (EmojiSource("test", count, size=32, distinct=True) for count in (3, 5))
    assert item_hashes(more)[:3] == item_hashes(few)
    assert len(set(item_hashes(more))) == 5
