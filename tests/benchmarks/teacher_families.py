"""Does every family of teachers go the whole road, and compute what its own library does?

Tiny random teachers are made in code and saved as their libraries save them: models of
transformers, OpenCLIP checkpoints, a sentence-transformers model, a LoRA adapter. Each is embedded
by EdgeCLIP and by its own model and processor, on pictures of odd shapes and texts of odd lengths;
then `edgeclip distill`, `export` and `verify` make a student and a bundle of it, the teacher is
exported as it is, and the runtime answers as torch does. `--quick` leaves out the teachers as they
are.
"""

import contextlib
import io
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _bars import Bar, Rule, finish, hold, options, say
from PIL import Image

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.cli.main import main as edgeclip
from edgeclip.runtime.console import columns
from edgeclip.runtime.encoder import Encoder
from tests.compress.teachers.teacher_factory import FAMILIES, Teacher

BARS: dict[str, Rule] = {
    # Largest difference of one value of an embedding, from torch and on a device.
    "*_parity": ("<=", 1e-5, ""),
    "*_road": ("<=", 1e-4, ""),
    "families": (">=", None, "of a student and a bundle"),  # all of them
}

SHAPES = ((32, 32), (61, 40), (37, 129), (5, 7), (300, 33), (33, 300), (224, 224), (1, 1))
TEXTS = (
    "",
    "a",
    "eagle left of a RED apple, on a blue background!",
    "  two\n\nspaces -- and (punctuation)...  ",
    "一只狗 собака 犬の写真 كلب कुत्ता 강아지 🦅",
    "ﬁne CAFÉ naïve Ⅳ ½",
    "a red apple left of a blue house " * 12,
)
SMALL = "--image-heads 1 --image-layers 1 --text-heads 1 --text-layers 1"
CONVOLUTIONAL = "--family convolutional --conv-widths 8 16 --text-heads 1 --text-layers 1"
CONVOLUTIONAL += " --conv-depths 1 1"
STEPS = "--count 24 --steps 6 --batch-size 8 --held-out 4"
WIDE = "--teacher-mean-cosine -1 --teacher-p1-cosine -1 --teacher-r1-kept 0"
ELSEWHERE = "--device x86-avx2 --precisions fp32 --test-count 24 --calibration-count 8"
ELSEWHERE += " --accept-undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """What a family came to.

    Attributes:
        family: its name in the tests.
        layout: the class that it is loaded as.
        image, text: the largest difference to its own library.
        student, teacher: the largest difference of the runtime to torch, of the student's bundle
            and the teacher's; None where the road ended before.
        failed: the step that failed, and why; empty if none did.
        seconds: of the whole road.
    """

    family: str
    layout: str
    image: float
    text: float
    student: float | None
    teacher: float | None
    failed: str
    seconds: float


def pictures() -> list[Image.Image]:
    """Smooth pictures, so that resizing is tried and not the noise in it."""
    found = []
    for width, height in SHAPES:
        y, x = np.mgrid[0:height, 0:width]
        waves = [127.5 + 127.5 * np.sin(k * x / width + 5 * y / height) for k in (3, 7, 11)]
        found.append(Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)))
    return found


def parity(made: Teacher, loaded: DualEncoder) -> tuple[float, float]:
    with torch.inference_mode():
        image = loaded.embed_image(loaded.preprocess(pictures()))
        text = loaded.embed_text(loaded.tokenize(TEXTS))
    apart = (image - made.embed_image(pictures()), text - made.embed_text(TEXTS))
    return float(apart[0].abs().max()), float(apart[1].abs().max())


def on_device(bundle: Path, model: DualEncoder) -> float:
    """Return the largest difference between the runtime's embeddings and torch's."""
    encoder = Encoder.open(bundle)
    with torch.inference_mode():
        image = model.embed_image(model.preprocess(pictures())).numpy()
        text = model.embed_text(model.tokenize(TEXTS)).numpy()
    apart = (
        np.abs(encoder.encode_image(pictures()) - image).max(),
        np.abs(encoder.encode_text(list(TEXTS), truncate=True) - text).max(),
    )
    return float(max(apart))


def run(command: str) -> None:
    """Run a command of EdgeCLIP; raise what it said if it failed."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        status = edgeclip(command.split())
    if status != 0:
        raise RuntimeError((told.getvalue().strip().splitlines() or [f"status {status}"])[-1])


def travel(family: str, folder: Path, *, quick: bool) -> Road:
    """Make a teacher, and go the whole road."""
    start = time.perf_counter()
    made = FAMILIES[family](folder / family)
    loaded = DualEncoder.load(made.folder)
    image, text = parity(made, loaded)
    student: float | None = None
    teacher: float | None = None
    failed, step = "", ""
    named, out, bundle = f"--teacher {made.folder}", folder / "student", folder / "bundle"
    shape = CONVOLUTIONAL if family.startswith("convnext") else SMALL
    try:
        step = "distill"
        run(f"distill {named} --out {out} {shape} {STEPS}")
        step = "export"
        run(f"export {out} {named} --out {bundle} {ELSEWHERE} {WIDE}")
        step = "verify"
        run(f"verify {bundle}")
        step = "runtime"
        student = on_device(bundle, DualEncoder.load(out))
        if not quick:
            step = "export as it is"
            run(f"export {made.folder} --own-space --out {bundle}-own {ELSEWHERE}")
            run(f"verify {bundle}-own")
            teacher = on_device(Path(f"{bundle}-own"), loaded)
    except Exception as error:  # whatever it is, the other families go on
        failed = f"{step}: {error}"
    return Road(
        family=family,
        layout=type(loaded.model).__name__,
        image=image,
        text=text,
        student=student,
        teacher=teacher,
        failed=failed,
        seconds=time.perf_counter() - start,
    )


def table(roads: list[Road]) -> str:
    head = ("family", "loaded as", "image", "text", "student's bundle", "own bundle", "s", "")
    rows = [
        (
            road.family,
            road.layout,
            f"{road.image:.1e}",
            f"{road.text:.1e}",
            "" if road.student is None else f"{road.student:.1e}",
            "" if road.teacher is None else f"{road.teacher:.1e}",
            f"{road.seconds:.0f}",
            road.failed,
        )
        for road in roads
    ]
    return columns([head, *rows], left=2)


def bars(roads: list[Road]) -> list[Bar]:
    found = []
    for road in roads:
        worst = max(road.image, road.text)
        found.append(hold(BARS, f"{road.family}_parity", worst))
        devices = [item for item in (road.student, road.teacher) if item is not None]
        apart = max(devices, default=float("inf")) if not road.failed else float("inf")
        found.append(hold(BARS, f"{road.family}_road", apart))
    done = sum(not road.failed for road in roads)
    return [*found, hold(BARS, "families", done, len(FAMILIES))]


def main() -> int:
    args = options(__doc__).parse_args()
    torch.set_num_threads(1)
    logging.getLogger("edgeclip").setLevel(logging.ERROR)
    roads = []
    for family in FAMILIES:
        say(f"{family} ...")
        with tempfile.TemporaryDirectory() as folder:
            roads.append(travel(family, Path(folder), quick=args.quick))
    print(
        "Largest difference of a value of an embedding, to the teacher's own library and to torch"
    )
    print(table(roads))
    return finish(bars(roads), args.out, roads=roads)


if __name__ == "__main__":
    sys.exit(main())
