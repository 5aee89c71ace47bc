"""How far a watch for drift has come, as a small file: a restart of the device forgets nothing."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.ranges import Range, check_ranges
from edgeclip.profiles.schema import parse
from edgeclip.runtime.cascade.martingale import Capital
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.files import atomic_file


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftState:
    """All that a `DriftWatch` needs to go on, some 3 kB however long the stream was.

    Attributes:
        seed: of the random numbers that break ties.
        counts: how many scores each bin holds, those of the certificate included.
        seen: how many scores of the stream were looked at.
        capital: how the bet stands.
        restarts: natural logarithm of the Shiryaev-Roberts sum; None before the first score.
        alarm_at: the number of the score that raised the alarm, from 1; None if none did.

    Raises:
        ValueError: a negative number.
    """

    seed: Annotated[int, Range(at_least=0)]
    counts: tuple[int, ...]
    seen: Annotated[int, Range(at_least=0)] = 0
    capital: Capital = field(default_factory=Capital)
    restarts: float | None = None
    alarm_at: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_file(path) as temporary:
            text = json.dumps(dataclasses.asdict(self), allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "DriftState | None":
        """Read what `save` wrote; None if there is no such file.

        Raises:
            InputError: it cannot be read, or is damaged.
        """
        mend = "delete it to start a new watch"
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            return parse(DriftState, data, source=str(path))
        except FileNotFoundError:
            return None
        except ConfigError as error:
            raise InputError("; ".join(str(error).split("\n  ")) + f": {mend}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is not the state of a drift watch ({error}): {mend}"
            ) from None
