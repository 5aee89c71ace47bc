"""Read text files as people's programs write them: UTF-8 or UTF-16, any of the three line ends."""

import codecs
import re
from pathlib import Path

from edgeclip.runtime.errors import InputError

# Not `str.splitlines`: that also ends lines at form feeds, U+0085, U+2028 and others, which
# captions copied from web pages and PDF files hold.
_LINE_END = re.compile(r"\r\n|\r|\n")
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, or what its byte order mark says; UTF-16 also without a mark.

    Raises:
        InputError: the file cannot be read, is in another encoding, or holds a NUL character;
            the message names the line.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from None
    mark, encoding = next((item for item in _MARKS if data.startswith(item[0])), (b"", ""))
    if not encoding:
        encoding = _guess(data[:4096])
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before = data[len(mark) : len(mark) + error.start].decode(encoding, "replace")
        found = f"byte 0x{error.object[error.start]:02X} is not {encoding.upper()} text"
        raise InputError(
            f"{path}, line {len(_LINE_END.findall(before)) + 1}: {found}; save it as UTF-8"
        ) from None
    if "\0" in text:
        line = len(_LINE_END.findall(text[: text.index("\0")])) + 1
        raise InputError(f"{path}, line {line}: a NUL character; is it a text file?")
    return text


def _guess(data: bytes) -> str:
    """Tell UTF-16 by its many NUL bytes, which stand at odd or at even places alone."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) * 8 > len(data) and min(even, odd) * 4 < max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def split_lines(text: str) -> list[str]:
    r"""Split at \n, \r\n and \r alone; what ends the last line starts no further one."""
    lines = _LINE_END.split(text)
    return lines[:-1] if not lines[-1] else lines


def read_lines(path: Path) -> list[str]:
    """Read a text file with one item on each line, without white space around it.

    Item i is line i + 1 of the file; empty lines at its end are dropped.

    Raises:
        InputError: as `read_text`, no lines at all, or an empty one before the last.
    """
    lines = [line.strip() for line in split_lines(read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{path} holds no texts: write one per line")
    if "" in lines:
        raise InputError(
            f"{path}, line {lines.index('') + 1} is empty: delete it, so that row i is line i"
        )
    return lines
