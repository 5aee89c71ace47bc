"""Divide a data set into splits: by what it says itself, or by a hash of each item's key."""

from collections.abc import Collection

from edgeclip.compress.data.emoji_scenes import SPLIT_SHARES, Split, hash_share
from edgeclip.runtime.errors import ConfigError

# What data sets call their splits; `restval` is what Karpathy and Fei-Fei add to COCO's training
# pictures.
_MEANINGS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("calibration", "dev", "val", "valid", "validation"), "calibration"),
    **dict.fromkeys(("test", "testing"), "test"),
    "unseen": "unseen",
}


class EmptySplitError(ConfigError):
    """No item of a source is of the split that is asked for."""


class OwnSplits:
    """The splits that a data set comes with.

    They are used if there is one to train on and one to test or validate on; one alone of the
    latter is halved by the hash, for calibration and for test. Else all items are divided by the
    hash.

    Args:
        names: the data set's names of its splits; those that mean nothing here are ignored.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = tuple(names)
        meanings = {name: _MEANINGS.get(name.casefold()) for name in names}
        self._meanings = {name: meant for name, meant in meanings.items() if meant}
        meant = set(self._meanings.values())
        self._judging = meant & {"calibration", "test"}
        self.are_used = "train" in meant and bool(self._judging)

    def names_of(self, split: Split) -> tuple[str, ...]:
        """Return the names whose items may belong to a split; `bounds` tells which of them."""
        if not self.are_used:
            return self._names
        meant = self._judging if split in ("calibration", "test") and self._is_halved else {split}
        return tuple(name for name in self._names if self._meanings.get(name) in meant)

    @property
    def _is_halved(self) -> bool:
        return len(self._judging) == 1

    def bounds(self, split: Split) -> tuple[float, float]:
        """Return which items of `names_of` are of a split: of hashes from the first to the second.

        A hash is in [0, 1).
        """
        if self.are_used:
            if split in ("calibration", "test") and self._is_halved:
                return (0.0, 0.5) if split == "calibration" else (0.5, 1.0)
            return 0.0, 1.0
        low = 0.0
        for name, high in SPLIT_SHARES:
            if name == split:
                return low, high
            low = high
        return 0.0, 0.0

    def include(self, split: Split, name: str | None, key: str) -> bool:
        """Tell whether an item is of a split, by the data set's name of its split and by its key.

        An item that the data set puts into no known split is of none, where others are.
        """
        if self.are_used and name not in self.names_of(split):
            return False
        low, high = self.bounds(split)
        return low <= hash_share(key) < high
