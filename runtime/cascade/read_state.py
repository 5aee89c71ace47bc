"""Read a file of what runs remember of earlier ones, such as a drift watch or a ledger."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.errors import ConfigError, InputError

Record = TypeVar("Record", bound=JsonRecord)


def read_state(
    kind: type[Record], path: Path, check: Callable[[Record], object] = lambda record: None
) -> Record | None:
    """Read a record from a file; None if there is no file.

    Args:
        kind: class of the record; its `HINT` is the mend of a damaged file.
        path: the file.
        check: raises `InputError` or `ValueError` for a record that makes no sense.

    Raises:
        InputError: the file cannot be read, or its content is damaged.
    """
    try:
        found = kind.load(path)
        check(found)
    except (ConfigError, InputError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | NotADirectoryError):
            return None
        if isinstance(cause, OSError):  # the content may be whole: nothing to delete
            raise InputError(str(error)) from cause
        words = "; ".join(str(error).split("\n  "))
        hint = "" if kind.HINT in words else f": {kind.HINT}"
        raise InputError(f"{path} is damaged: {words}{hint}") from None
    return found
