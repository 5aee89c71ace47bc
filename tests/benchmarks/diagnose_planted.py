"""Whether `diagnose` finds faults that were planted, names them, and is silent about a healthy one.

A healthy student is the built-in teacher's without a quarter of its image layers, distilled for a
few steps. Of it three are made that are ill:

- a layer, of either tower in turn, has its weights drawn anew with the same spread;
- the text tower is trained on for some steps with the captions of other pictures;
- the image tower is trained on for some steps while the teacher's embeddings of one group (a
  background) come from pictures whose red and blue are exchanged, as a camera or a program that
  writes BGR leaves them.

A fault is found if a finding of its kind names the very layer, tower or group, and no finding of
another planted kind is raised beside it. With every seed the layer, the group, the order of
training and the test scenes are others. The healthy student raises none of the three.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from _bars import Rule, finish, hold, options, say
from PIL import Image
from torch import Tensor, nn

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.compute import autocast
from edgeclip.compress.data.emoji_scenes import BACKGROUNDS
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.diagnose.diagnose import Inputs, diagnose
from edgeclip.compress.diagnose.diagnosis import Finding
from edgeclip.compress.diagnose.groups import find_groups
from edgeclip.compress.diagnose.layers import TowerRun, find_layers
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.shares import estimate_share

BARS: dict[str, Rule] = {
    "broken_layer_found": (">=", 1.0, ""),
    "shuffled_captions_found": (">=", 1.0, ""),
    "wrong_colours_found": (">=", 1.0, ""),
    "healthy_false_alarms": ("<=", 0.0, ""),
}
KEPT_MODELS = ("compress/emoji_teacher",)
PLANTED = ("broken layer", "shuffled captions", "wrong colours")
SHAPE = StudentShape(image_heads=4, image_layers=6, text_heads=4, text_layers=3)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: seeds, test scenes, steps of training and pictures of a step."""

    seeds: int = 2
    test: int = 1000
    steps: int = 60
    batch: int = 64


QUICK = Sizes(seeds=1, test=360, steps=24, batch=32)


@dataclass(frozen=True)
class Case:
    """A student that was diagnosed: what was planted where, and what was found."""

    seed: int
    fault: str
    subject: str
    found: tuple[str, ...]
    is_right: bool


class Training:
    """Trains a tower on scenes, with AdamW, towards given embeddings.

    Args:
        teacher: whose embeddings are the targets.
        seed: of the scenes.
        sizes: steps and batch.
    """

    def __init__(self, teacher: DualEncoder, seed: int, sizes: Sizes) -> None:
        self.teacher, self.sizes = teacher, sizes
        self.scenes = EmojiSource(
            "train", sizes.steps * sizes.batch, size=teacher.image_spec.size, seed=seed
        )

    def run(
        self, student: DualEncoder, part: Callable[[str], bool], loss: Callable[[int], Tensor]
    ) -> None:
        """Take the steps; of the weights those learn whose name `part` chooses."""
        own = [weight for name, weight in student.named_parameters() if part(name)]
        optimizer = torch.optim.AdamW(own)
        for step in range(self.sizes.steps):
            for group in optimizer.param_groups:  # rises over the first steps, then falls
                share = step / self.sizes.steps
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 5) * (1 - 0.9 * share)
            optimizer.zero_grad()
            with autocast("auto", student.device):
                total = loss(step)
            total.backward()
            nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
        student.eval()

    def indices(self, step: int) -> range:
        """The scenes of a step."""
        return range(step * self.sizes.batch, (step + 1) * self.sizes.batch)

    def pictures(self, step: int) -> list[Image.Image]:
        """The pictures of a step."""
        return [self.scenes[index].image for index in self.indices(step)]

    def captions(self, step: int) -> list[str]:
        """The captions of a step."""
        return [self.scenes.caption(index) for index in self.indices(step)]

    def target(self, pictures: list[Image.Image]) -> Tensor:
        """The teacher's embeddings of pictures."""
        with torch.no_grad():
            return self.teacher.embed_image(self.teacher.preprocess(pictures))


def healthy_student(teacher: DualEncoder, seed: int, sizes: Sizes) -> DualEncoder:
    """Inherit, and distil the layers that follow what was left out."""
    student = new_student(teacher, SHAPE, seed=seed)
    training = Training(teacher, 100 + seed, sizes)

    def loss(step: int) -> Tensor:
        pictures = training.pictures(step)
        ours = student.embed_image(student.preprocess(pictures))
        return (1 - (ours * training.target(pictures)).sum(dim=1)).mean()

    training.run(student, lambda name: _is_last(name), loss)
    return student


def _is_last(name: str) -> bool:
    """Whether a weight of the image tower lies in its last three layers or behind them."""
    last = any(f"vision_model.encoder.layers.{number}." in name for number in (3, 4, 5))
    return last or "visual_projection" in name or "post_layernorm" in name


def break_layer(student: DualEncoder, tower: Tower, number: int, seed: int) -> None:
    """Draw the matrices of a layer anew, with the spread that they had."""
    layers = student.model.get_submodule(
        "vision_model.encoder.layers" if tower == "image" else "text_model.encoder.layers"
    )
    layer = list(layers.children())[number - 1]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())


def shuffle_captions(student: DualEncoder, teacher: DualEncoder, seed: int, sizes: Sizes) -> None:
    """Train the text tower on with the captions of a batch in another order.

    It learns as `distill` teaches it: to give the teacher's embedding, and to find the picture
    among those of the batch.
    """
    training = Training(teacher, 200 + seed, sizes)
    rng = np.random.default_rng(seed)
    scale = float(teacher.logit_scale.detach().exp())

    def loss(step: int) -> Tensor:
        captions = training.captions(step)
        order = rng.permutation(len(captions))
        wrong = np.empty(len(order), np.int64)
        wrong[order] = np.roll(order, 1)  # a ring, so that no caption keeps its place
        with torch.no_grad():
            text = teacher.embed_text(teacher.tokenize(captions))[wrong]
        ours = student.embed_text(student.tokenize(captions))
        image = training.target(training.pictures(step))[wrong]
        feature = (1 - (ours * text).sum(dim=1)).mean()
        place = torch.arange(len(captions))
        return feature + nn.functional.cross_entropy(scale * ours @ image.T, place)

    training.run(student, lambda name: "text_" in name, loss)


def exchange_colours(
    student: DualEncoder, teacher: DualEncoder, background: str, seed: int, sizes: Sizes
) -> None:
    """Train the image tower on with targets of one background from pictures in BGR.

    Half of each batch is of that background, which a tenth of all scenes has.
    """
    training = Training(teacher, 300 + seed, sizes)
    of_group = [
        index
        for index in range(len(training.scenes))
        if training.scenes.scene(index).background == background
    ]

    def loss(step: int) -> Tensor:
        half = sizes.batch // 2
        some = [of_group[(step * half + at) % len(of_group)] for at in range(half)]
        indices = [*some, *training.indices(step)[:half]]
        pictures = [training.scenes[index].image for index in indices]
        wrong = [
            Image.fromarray(np.asarray(picture)[..., ::-1])
            if training.scenes.scene(index).background == background
            else picture
            for index, picture in zip(indices, pictures, strict=True)
        ]
        ours = student.embed_image(student.preprocess(pictures))
        return (1 - (ours * training.target(wrong)).sum(dim=1)).mean()

    training.run(student, _is_last, loss)


def examine(
    student: DualEncoder, teacher: DualEncoder, seed: int, sizes: Sizes
) -> tuple[Finding, ...]:
    """Diagnose a student on test scenes of its own."""
    size = teacher.image_spec.size
    source = EmojiSource("test", sizes.test, size=size, seed=seed, distinct=True)
    given = Inputs(
        teacher=teacher,
        student=student,
        encoders={},
        source=source,
        groups=find_groups(source, (), None),
        outside=EmojiSource("unseen", sizes.test // 4, size=size, seed=seed, distinct=True),
        seed=seed,
    )
    return diagnose(given)[0].findings


# Backgrounds that look like another when red and blue are exchanged.
COLOURED = ("blue", "orange", "red", "teal", "yellow", "brown")


def cases(teacher: DualEncoder, seed: int, sizes: Sizes) -> list[Case]:
    """Plant each fault into a student of this seed, and diagnose all four."""
    healthy = healthy_student(teacher, seed, sizes)
    tower: Tower = "text" if seed % 2 else "image"
    layers = len(find_layers(_run(healthy, tower)))
    number = seed % layers + 1
    background = COLOURED[seed % len(COLOURED)]
    assert background in BACKGROUNDS
    planted: list[tuple[str, str, Callable[[DualEncoder], None]]] = [
        ("healthy", "", lambda _: None),
        (
            "broken layer",
            f"{tower} tower: layer {number}",
            lambda student: break_layer(student, tower, number, seed),
        ),
        (
            "shuffled captions",
            "text tower",
            lambda student: shuffle_captions(student, teacher, seed, sizes),
        ),
        (
            "wrong colours",
            f"background {background}",
            lambda student: exchange_colours(student, teacher, background, seed, sizes),
        ),
    ]
    done = []
    for fault, subject, plant in planted:
        student = copy.deepcopy(healthy)
        plant(student)
        findings = examine(student, teacher, seed, sizes)
        found = tuple(f"{item.kind}: {item.subject}" for item in findings if item.kind in PLANTED)
        wanted = () if fault == "healthy" else (f"{fault}: {subject}",)
        done.append(Case(seed, fault, subject, found, found == wanted))
        say(f"seed {seed}, {fault} {subject}: {', '.join(found) or 'nothing'}")
    return done


def _run(student: DualEncoder, tower: Tower) -> TowerRun:
    side = student.image_spec.size
    inputs = torch.zeros(1, 3, side, side) if tower == "image" else student.tokenize(["a"])
    return TowerRun(student, tower, inputs)


def main() -> int:
    """Plant, diagnose, print the table and the bars."""
    args = options(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    teacher = DualEncoder.load(built_in_teacher())
    done = [case for seed in range(sizes.seeds) for case in cases(teacher, seed, sizes)]
    print(f"{'fault':<20}{'right':>6}{'of':>4}")
    bars = []
    for fault in ("healthy", *PLANTED):
        own = np.array([case.is_right for case in done if case.fault == fault])
        print(f"{fault:<20}{own.sum():>6}{len(own):>4}")
        if fault == "healthy":
            bars.append(hold(BARS, "healthy_false_alarms", float((~own).sum())))
        else:
            name = f"{fault.replace(' ', '_')}_found"
            bars.append(hold(BARS, name, estimate_share(own).interval))
    return finish(bars, args.out, cases=[asdict(case) for case in done], sizes=asdict(sizes))


if __name__ == "__main__":
    sys.exit(main())
