"""Order the items of a training run: shuffled every epoch, mixed by weight, of any number.

No order is ever written down. An epoch's shuffle is a keyed permutation of 0..n-1 that is computed
for the positions that are asked for, so a step costs the same with ten thousand items and with a
billion: the generalised Feistel cipher of Black and Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002), with cycle walking. Its rounds mix with the finaliser of SplitMix64 (Steele,
Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import ConfigError

MOST_HELD_OUT = 256  # unless the user asks for more: R@1 is then known to 6 points

Int64 = NDArray[np.int64]
_UInt64 = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step, 2^64 over the golden ratio
_MASK = 2**64 - 1
_SHARES = 2**30  # weights are rounded to multiples of one over this
_MOST_SHARES = 2**31  # two of these multiply within int64
_HELD_OUT_KEY = 0x4EC5  # no seed: every run on the same data holds the same items out


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mixture.

    Args:
        count: number of its items, at least 1.
        weight: its share of the samples beside the weights of the other parts; None for a share in
            proportion to its items. Either all parts have a weight or none has.

    Raises:
        ConfigError: a count or weight that is not above 0.
    """

    count: int
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"a part of the training data has {self.count} items: give some")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ConfigError(f"a weight of the training data is {self.weight:g}: give one above 0")


class Sampling:
    """The items of every position of a training run, and those held out of it.

    Items are numbered through all parts, in their order. Every part goes through its items once an
    epoch of its own, in another order each time, and the parts take turns as evenly as their
    weights allow: among any first P positions, a part of share s has P s, but for at most the
    number of parts. Everything is a function of the parts, the seed, the number held out and the
    position.

    Args:
        parts: the sources, at least one.
        seed: another seed is another order; what is held out does not depend on it.
        held_out: number of items that are not trained on, taken from the parts in proportion to
            their items; None for a tenth, at most `MOST_HELD_OUT`.

    Attributes:
        held_out: indices of the items that are not trained on, int64, ascending.
        train_count: number of the other items.

    Raises:
        ConfigError: no parts, weights for some of them only, a negative seed, or more held out
            than leave every part an item.
    """

    def __init__(
        self, parts: Sequence[Part], *, seed: int = 0, held_out: int | None = None
    ) -> None:
        if not parts:
            raise ConfigError("there is no training data: give at least one source")
        if len({part.weight is None for part in parts}) > 1:
            raise ConfigError("give a weight to every source of the training data, or to none")
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {seed}")
        counts = [part.count for part in parts]
        held = _held_out_of_parts(counts, held_out)
        self._first = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        self._held = np.array(held, np.int64)
        self._count = np.array(counts, np.int64)
        self._train = self._count - self._held
        self._keys = np.array([_key(seed, number) for number in range(len(parts))], dtype=np.uint64)
        self._shares = _shares(parts, self._train.tolist())
        self.train_count = int(self._train.sum())
        ranks = [np.arange(number, dtype=np.int64) for number in held]
        self.held_out: Int64 = np.sort(
            np.concatenate([self._item(part, own) for part, own in enumerate(ranks)])
        )

    def items(self, first: int, count: int) -> tuple[Int64, Int64]:
        """Return the items at the positions `first` to `first + count - 1`, and their epochs.

        Both are int64 [count]. The epoch of an item counts the passes through its part, from 0.

        Raises:
            ValueError: a negative position or count.
        """
        if first < 0 or count < 0:
            raise ValueError(f"need a position and a count of 0 or more, got {first} and {count}")
        index, epoch = np.empty(count, np.int64), np.empty(count, np.int64)
        places = np.arange(count)
        rank = np.arange(first, first + count, dtype=np.int64)  # among the parts that are left
        left = sum(self._shares)
        for part, share in enumerate(self._shares):
            before = _scaled(rank, share, left)
            is_own = _scaled(rank + 1, share, left) > before
            passes, offset = np.divmod(before[is_own], self._train[part])
            keys = mix64(self._keys[part] + passes.astype(np.uint64) * np.uint64(_GOLDEN))
            slot = _permuted(offset, int(self._train[part]), keys)
            index[places[is_own]] = self._item(part, self._held[part] + slot)
            epoch[places[is_own]] = passes
            places, rank = places[~is_own], (rank - before)[~is_own]
            left -= share
        return index, epoch

    def _item(self, part: int, rank: Int64) -> Int64:
        """Return the items of a part by their rank, in which those held out come first."""
        count = int(self._count[part])
        keys = np.full(rank.shape, _key(_HELD_OUT_KEY, count), np.uint64)
        return _permuted(rank, count, keys) + np.int64(self._first[part])


def _held_out_of_parts(counts: Sequence[int], wanted: int | None) -> list[int]:
    """Return how many items of each part are held out: in proportion, but never all of a part."""
    total, most = sum(counts), sum(counts) - len(counts)
    number = min(total // 10, MOST_HELD_OUT, most) if wanted is None else wanted
    if not 0 <= number <= most:
        raise ConfigError(
            f"cannot hold {number} of {total} pictures out of training: choose 0 to {most}"
        )
    held = [min(count - 1, number * count // total) for count in counts]
    # The largest remainders first; where a part has no more to give, the next ones again.
    order = sorted(range(len(counts)), key=lambda part: (-(number * counts[part] % total), part))
    while sum(held) < number:
        for part in order:
            if sum(held) < number and held[part] < counts[part] - 1:
                held[part] += 1
    return held


def _shares(parts: Sequence[Part], train: Sequence[int]) -> list[int]:
    """Return the share of each part as an integer; only their ratios matter."""
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        if sum(train) <= _MOST_SHARES:
            return list(train)  # exactly one epoch of each part in `train_count` positions
        weights = [float(count) for count in train]
    total = math.fsum(weights)
    return [max(1, round(weight / total * _SHARES)) for weight in weights]


def _scaled(rank: Int64, share: int, whole: int) -> Int64:
    """Return floor(rank * share / whole) without overflow."""
    passes, rest = np.divmod(rank, np.int64(whole))
    scaled: Int64 = passes * share + rest * share // whole
    return scaled


def _key(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


def _permuted(values: Int64, count: int, keys: _UInt64) -> Int64:
    """Return where keyed permutations of 0..count-1 take `values`, a key for each value."""
    # A number is row * columns + column, and the rectangle of these is hardly larger than `count`.
    columns = max(1, math.isqrt(count - 1) + 1)
    rows = -(-count // columns)
    found = values.astype(np.uint64)
    astray = np.arange(len(found))
    while len(astray):  # cycle walking: what falls beyond `count` is permuted again
        found[astray] = _feistel(found[astray], rows, columns, keys[astray])
        astray = astray[found[astray] >= count]
    return found.astype(np.int64)


def _feistel(values: _UInt64, rows: int, columns: int, keys: _UInt64) -> _UInt64:
    """Permute the numbers below rows * columns."""
    row, column = np.divmod(values, np.uint64(columns))
    for number in range(0, _ROUNDS, 2):
        row = (row + mix64(column ^ _round_key(keys, number))) % np.uint64(rows)
        column = (column + mix64(row ^ _round_key(keys, number + 1))) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _round_key(keys: _UInt64, number: int) -> _UInt64:
    return keys + np.uint64((number + 1) * _GOLDEN & _MASK)


def mix64(values: _UInt64) -> _UInt64:
    """Return a hash of each value, the same for every equal one: SplitMix64's finaliser."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
