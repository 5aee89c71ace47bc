"""Whether a model directory whose parts do not belong together is ever silently wrong.

Small models of four families with random weights are broken in one way each: a file removed, cut,
or of another model; a field of config, tokenizer or processor changed; weights changed. Each
directory goes through load, cache and export as a user would send it. Where a bundle comes out, it
must answer as transformers' own model and processor of that directory do; where none does, an
error must say why. No directory may end in a traceback.
"""

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _bars import Bar, Rule, finish, hold, options
from _silent_breaks import all_breaks
from _silent_models import FAMILIES, copy_model, write_models, write_pictures
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, VisionTextDualEncoderModel

from edgeclip.runtime.cli.main import main as edgeclip
from edgeclip.runtime.encoder import Encoder

BARS: dict[str, Rule] = {
    "directories taken": (">=", None, ""),  # all that were planned
    "bundles that answer otherwise than transformers": ("<=", 0, ""),
    "tracebacks": ("<=", 0, ""),
    "unbroken directories with an equal bundle": (">=", None, ""),  # all of them
}

CASES, QUICK = 200, 24
TOLERANCE = 1e-3  # of any value of an embedding
TEXTS = (
    "",
    "a red apple",
    "Picture 3 of TEST: teal and brown",
    "naïve café 你好 🦉, 3 of them!",
    " ".join(["two pink houses left of a black owl"] * 40),
)
UNBROKEN = "nothing"
_EXPORT = ("--device", "x86-avx2", "--precisions", "fp32", "--accept-undecided")
Outcome = Literal["refused", "equal", "otherwise", "traceback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What came of one broken directory.

    Attributes:
        family: which model it was.
        broken: what was done to it.
        outcome: no bundle and a reason; a bundle that answers as transformers does, or otherwise;
            or a traceback.
        says: the reason, or what was otherwise.
        difference: largest difference of an embedding's value from that of transformers.
    """

    family: str
    broken: str
    outcome: Outcome
    says: str
    difference: float | None = None


def main() -> int:
    """Run all cases; 1 if a bar was missed."""
    args = options(__doc__ or "").parse_args()
    planned = list(plan(QUICK if args.quick else CASES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models")
        write_pictures(folder / "pictures")
        workers = os.cpu_count() or 1
        with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
            jobs = [pool.submit(run_case, folder, *item) for item in enumerate(planned)]
            cases = [job.result() for job in tqdm(jobs, desc="directories", disable=None)]
    show(cases)
    return finish(list(bars(cases, len(planned))), args.out, cases=[asdict(case) for case in cases])


def plan(count: int) -> Iterator[tuple[str, int | None]]:
    """Yield each family unbroken, then as often a family and the number of a way to break it.

    The next round through all ways goes on with the next family, so that no case comes twice.
    """
    families, ways = list(FAMILIES), all_breaks()
    yield from ((family, None) for family in families)
    # A stride without a common divisor visits every way, with all kinds among the first few.
    for number in range(count):
        place = number * 7 % len(ways) if len(ways) % 7 else number % len(ways)
        yield families[(number + number // len(ways)) % len(families)], place


def run_case(folder: Path, number: int, given: tuple[str, int | None]) -> Case:
    """Break one directory, send it through all commands, and judge what comes out."""
    family, place = given
    way = None if place is None else all_breaks()[place]
    own, out = folder / f"model-{number}", folder / f"out-{number}"
    copy_model(folder / "models", family, own)
    if way is not None:
        way.change(own, folder / "models")
    name = UNBROKEN if way is None else way.name
    status, said = 0, ""
    for command in (
        ("cache", "--teacher", own, "--out", out / "cache"),
        ("export", own, "--teacher", own, "--out", out / "bundle", *_EXPORT),
    ):
        try:
            code, text = run_command((*command, "--data", folder / "pictures"))
        except BaseException:  # whatever a user would see as a traceback
            last = traceback.format_exc().strip().splitlines()[-1]
            return Case(family=family, broken=name, outcome="traceback", says=last)
        if code and not status:
            status, said = code, text.replace(f"{folder}/", "")
    if "Traceback" in said:
        return Case(family=family, broken=name, outcome="traceback", says=said)
    if status:
        has_reason = status == 2 and bool(said)
        outcome: Outcome = "refused" if has_reason else "otherwise"
        return Case(family=family, broken=name, outcome=outcome, says=said or f"status {status}")
    try:
        difference = compare(own, out / "bundle", folder / "pictures" / "test")
    except Exception as error:  # transformers takes no such directory, but EdgeCLIP did
        says = f"{type(error).__name__}: {error}"
        return Case(family=family, broken=name, outcome="otherwise", says=says)
    return Case(
        family=family,
        broken=name,
        outcome="equal" if difference <= TOLERANCE else "otherwise",
        says="",
        difference=difference,
    )


def run_command(arguments: Iterable[object]) -> tuple[int, str]:
    """Run a command in this process; return its status, and the last line on stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        status = edgeclip([str(item) for item in arguments])
    lines = [line for line in stderr.getvalue().splitlines() if "error: " in line]
    return status, lines[-1] if lines else ""


def compare(model: Path, bundle: Path, pictures: Path) -> float:
    """Return the largest difference between a bundle and transformers, of texts and pictures.

    A text that transformers itself cannot take, for its tokenizer does not cut it, is left out.
    """
    encoder = Encoder.open(bundle)
    family: Any = CLIPModel
    if '"vision-text-dual-encoder"' in (model / "config.json").read_text(encoding="utf-8"):
        family = VisionTextDualEncoderModel
    theirs = family.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(model),
        AutoImageProcessor.from_pretrained(model),
    )
    worst = 0.0
    known = ("input_ids", "attention_mask")
    with torch.inference_mode():
        for text in TEXTS:
            given = tokenizer(text, truncation=True, return_tensors="pt")
            try:
                pooled = theirs.get_text_features(
                    **{key: given[key] for key in known}
                ).pooler_output
            except (IndexError, RuntimeError, ValueError):
                continue
            worst = max(worst, _apart(encoder.encode_text([text], truncate=True), pooled))
        for path in sorted(pictures.glob("*.png"))[:6]:
            picture = Image.open(path).convert("RGB")
            pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
            pooled = theirs.get_image_features(pixel_values=pixels).pooler_output
            worst = max(worst, _apart(encoder.encode_image([picture]), pooled))
    return worst


def _apart(ours: NDArray[np.float32], pooled: torch.Tensor) -> float:
    right = torch.nn.functional.normalize(pooled.float(), dim=-1).numpy()
    found = float(np.abs(ours - right).max())
    return found if np.isfinite(found) else 2.0


def _one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"


def show(cases: Sequence[Case]) -> None:
    """Print how many came to what, and each case that is not as it should be."""
    for outcome, count in Counter(case.outcome for case in cases).most_common():
        print(f"{count:>4} {outcome}")
    for case in cases:
        if case.outcome in ("otherwise", "traceback"):
            print(f"{case.family}: {case.broken}: {case.outcome} {case.difference} {case.says}")


def bars(cases: Sequence[Case], planned: int) -> Iterator[Bar]:
    """Nothing silently wrong, no traceback, and what is whole is not refused."""
    counts = Counter(case.outcome for case in cases)
    whole = [case for case in cases if case.broken == UNBROKEN]
    yield hold(BARS, "directories taken", len(cases), planned)
    name = "bundles that answer otherwise than transformers"
    yield hold(BARS, name, counts["otherwise"])
    yield hold(BARS, "tracebacks", counts["traceback"])
    equal = sum(case.outcome == "equal" for case in whole)
    yield hold(BARS, "unbroken directories with an equal bundle", equal, len(whole))


if __name__ == "__main__":
    sys.exit(main())
