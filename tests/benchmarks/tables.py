"""Is every item of 2,000 mutated tables, label files, text files and folders accounted for?

Caption tables (CSV and its like, JSON lines, COCO's and Karpathy's JSON), label files and text
files are written in the encodings, line ends, separators, headers and spellings that people use,
and many are then spoiled in a known way; folders hold images among all that may lie around. Each
must be read in full, or what is not read counted and named, or end in one line that names the file
and the place; some tables get random bytes, and need only be read or refused in that way. Nothing
may be cut, swapped, dropped in silence or end in another exception. Some folders go through
`edgeclip embed` as well.
"""

import contextlib
import io
import logging
import random
import re
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

from _bars import EMOJI_BUNDLE, Rule, finish, hold, options
from _tables_cases import Case, folder_case, lines_case, noise_case, table_case
from PIL import Image

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cli.main import main as edgeclip
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.captions import read_captions
from edgeclip.runtime.inputs.find_images import forget_left_out, list_images, report_left_out
from edgeclip.runtime.inputs.text_files import read_label_file, read_lines

BARS: dict[str, Rule] = {
    "unaccounted_cases": ("<=", 0, ""),
    "cases": (">=", None, ""),  # 2000, and 200 with --quick
}
KEPT_MODELS = ("export/emoji_bundle",)

KINDS = ("table", "labels", "texts", "folder", "noise")
SHARES = (0.45, 0.12, 0.12, 0.16, 0.15)
_PLACE = re.compile(r"line \d+|entry \d+|image \d+|annotation \d+")
# What concerns a whole file has no line.
_WHOLE = re.compile(r"images have no caption|names no images|holds no (?:texts|labels)")
_COUNT = re.compile(r"left out (\d+) files?:")


def make(kind: str, draw: random.Random, root: Path) -> Case:
    """Write one case."""
    if kind == "table":
        return table_case(draw, root)
    if kind == "noise":
        return noise_case(draw, root)
    return folder_case(draw, root) if kind == "folder" else lines_case(draw, root, kind)


def outcome(kind: str, case: Case) -> tuple[str, str]:
    """Read a case; return "read", "counted", "refused" or a fault, and what shows it."""
    forget_left_out()
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    log = logging.getLogger("edgeclip")
    log.addHandler(handler)
    log.propagate = False
    whole = False
    try:
        if kind == "noise":
            read_captions(case.path, list_images(case.path))
            fault = ""
        elif kind == "table":
            fault, whole = _read_table(case)
        elif kind == "folder":
            fault = _read_folder(case)
        else:
            read = read_label_file if kind == "labels" else read_lines
            found = list(read(case.path))
            fault = "" if found == case.items else f"read {found}, not {case.items}"
        report_left_out()
    except InputError as error:
        return _judge_refusal(case, str(error))
    except Exception as error:  # what this benchmark looks for
        return "exception", repr(error)
    finally:
        log.removeHandler(handler)
    if fault:
        return "wrong", fault
    count = _COUNT.search(told.getvalue())
    counted = int(count[1]) if count else 0
    if case.damaged and not (counted or whole or kind == "noise"):
        return "silent", "damaged, but nothing was said"
    if kind == "folder" and counted != case.others:
        return "silent", f"{counted} left out, not {case.others}: {told.getvalue().strip()}"
    return ("counted" if counted else "read"), ""


def _judge_refusal(case: Case, message: str) -> tuple[str, str]:
    if not (case.damaged or case.unmarked):
        return "refused whole", message
    located = _PLACE.search(message) or _WHOLE.search(message)
    one_line = "\n" not in message and str(case.path) in message
    return ("refused", message) if located and one_line else ("no place", message)


def _read_table(case: Case) -> tuple[str, bool]:
    """Return what is wrong, and whether every caption was read."""
    images = list_images(case.path)
    captions = read_captions(case.path, images)
    if captions is None:
        return "the table was not seen", False
    names = [
        unicodedata.normalize("NFC", path.relative_to(case.path).as_posix()) for path in images
    ]
    wanted = {unicodedata.normalize("NFC", name): own for name, own in case.truth.items()}
    found = dict(zip(names, captions, strict=True))
    if found == wanted:
        return "", True
    for name, own in found.items():
        # Of a spoiled table too, what is read must be whole captions of that image.
        if not case.damaged or set(own) - set(wanted[name]):
            return f"{name}: read {own}, not {wanted[name]}", False
    return "", False


def _read_folder(case: Case) -> str:
    found = {path.relative_to(case.path).as_posix() for path in list_images(case.path)}
    return "" if found == set(case.truth) else f"found {found ^ set(case.truth)} too many or few"


def embed_folder(case: Case, out: Path) -> str:
    """Run a folder through `edgeclip embed`; return what is wrong with the result."""
    for name in case.truth:
        with (case.path / name).open("wb") as file:
            Image.new("RGB", (9, 9), (len(name), 0, 0)).save(file, "PNG")
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = edgeclip(
            ["embed", str(case.path), "--bundle", str(EMOJI_BUNDLE), "--out", str(out)]
        )
    if status:
        return f"status {status}: {stderr.getvalue()[-300:]}"
    keys = Index.load(out).keys
    count = _COUNT.search(stderr.getvalue())
    wanted = {(case.path / name).as_posix() for name in case.truth}
    if set(keys) != wanted:
        return f"embedded {set(keys) ^ wanted} too many or few"
    return "" if int(count[1] if count else 0) == case.others else stderr.getvalue()[-300:]


def main() -> int:
    """Make, read and judge every case."""
    args = options(__doc__ or "").parse_args()
    total, embedded = (200, 3) if args.quick else (2000, 25)
    draw = random.Random(0)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    faults: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(total):
            (kind,) = draw.choices(KINDS, SHARES)
            root = Path(scratch) / f"{number:04d}"
            root.mkdir()
            case = make(kind, draw, root)
            found, shown = outcome(kind, case)
            outcomes[kind][found] += 1
            if found not in ("read", "counted", "refused"):
                faults.append(f"{number}: {case.what}: {found}: {shown}")
        ran = 0
        for number in range(embedded):
            root = Path(scratch) / f"embed-{number}"
            root.mkdir()
            wrong = embed_folder(folder_case(draw, root), Path(scratch) / f"{number}.npz")
            faults += [f"embed {number}: {wrong}"] if wrong else []
            ran += not wrong
    seconds = time.monotonic() - began
    columns = sorted({name for counter in outcomes.values() for name in counter})
    print(f"{'':<8}" + "".join(f"{name:>15}" for name in columns))
    for kind, counter in outcomes.items():
        print(f"{kind:<8}" + "".join(f"{counter[name]:>15}" for name in columns))
    print(f"{ran} of {embedded} folders went through edgeclip embed whole; {seconds:.0f} s in all")
    for line in faults[:20]:
        print(line)
    bars = [
        hold(BARS, "unaccounted_cases", len(faults)),
        hold(BARS, "cases", total, 200 if args.quick else 2000),
    ]
    kept = {kind: dict(sorted(counter.items())) for kind, counter in outcomes.items()}
    return finish(bars, args.out, outcomes=kept, embedded=ran, seconds=round(seconds, 1))


if __name__ == "__main__":
    sys.exit(main())
