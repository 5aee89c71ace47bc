"""How many unreadable items a command may skip, and what it says of them."""

import argparse
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgeclip.runtime.errors import InputError

_log = logging.getLogger(__name__)

_LISTED = 20  # skipped items that are named; -v names all
_IN_ERROR = 5
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True, slots=True)
class MaxBad:
    """The most items that may be unreadable: a share of all, and a number allowed in any case.

    The default is 1%, or 5 in a set so small that 1% of it is less.
    """

    share: float = 0.01
    count: int = 5

    def allowed(self, total: int) -> int:
        """Return how many of `total` items may be unreadable."""
        return max(self.count, math.floor(self.share * total + 1e-9))


DEFAULT_MAX_BAD = MaxBad()


def parse_max_bad(text: str) -> MaxBad:
    """Convert the argument of `--max-bad`, such as 1% or 20, for argparse."""
    match = _LIMIT.fullmatch(text.strip())
    if match is None or (not match[2] and not match[1].isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a share such as 1% nor a number such as 20"
        )
    if not match[2]:
        return MaxBad(share=0.0, count=int(match[1]))
    if float(match[1]) > 100:
        raise argparse.ArgumentTypeError(f"{text} is more than 100%")
    return MaxBad(share=float(match[1]) / 100, count=0)


def add_max_bad_option(parser: argparse.ArgumentParser) -> None:
    """Add `--max-bad`."""
    parser.add_argument(
        "--max-bad",
        type=parse_max_bad,
        default=DEFAULT_MAX_BAD,
        metavar="LIMIT",
        help="how many images may be unreadable, as a share such as 1%% or a number; they are "
        f"skipped and named (default: {100 * DEFAULT_MAX_BAD.share:g}%%, and always "
        f"{DEFAULT_MAX_BAD.count})",
    )


def report_bad(reasons: Sequence[str], total: int, limit: MaxBad | None) -> None:
    """Log the items that were skipped and their number.

    Args:
        reasons: what is wrong with each, beginning with its name.
        total: how many items there are, with these.
        limit: how many may be skipped; None for any number.

    Raises:
        InputError: more are unreadable than `limit` allows, or all are.
    """
    for reason in reasons[:_LISTED]:
        _log.info("skipped: %s", reason)
    for reason in reasons[_LISTED:]:
        _log.debug("skipped: %s", reason)
    if len(reasons) > _LISTED:
        _log.info("skipped: %d more, which -v names", len(reasons) - _LISTED)
    if reasons:
        _log.info("skipped %d of %d images", len(reasons), total)
    if reasons and len(reasons) == total:
        raise InputError(f"none of {total} images could be read; the first: {reasons[0]}")
    allowed = total if limit is None else limit.allowed(total)
    if len(reasons) > allowed:
        shown = "; ".join(reasons[:_IN_ERROR])
        more = len(reasons) - _IN_ERROR
        raise InputError(
            f"{len(reasons)} of {total} images cannot be read, and {allowed} are allowed: "
            f"{shown}{f'; and {more} more' if more > 0 else ''}. Mend or remove them, or allow "
            f"more with --max-bad {math.ceil(1000 * len(reasons) / total) / 10:g}%"
        )
