"""Training speed of the image tower: number format, attention, patch size, size of the student.

One forward and backward pass of a batch, all candidates in turns in one run. These figures
chose bfloat16, written-out attention and the sizes of the built-in teacher and student.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from _bars import finish, options
from transformers import CLIPVisionConfig, CLIPVisionModel

_BATCH, _SIZE = 64, 64


@dataclass(frozen=True, slots=True)
class Case:
    """One tower and how it computes."""

    width: int
    layers: int
    patch: int
    attention: str
    bfloat16: bool

    @property
    def name(self) -> str:
        """For the table."""
        kind = "bf16" if self.bfloat16 else "fp32"
        return f"{self.width}x{self.layers} patch {self.patch} {self.attention} {kind}"


_CASES = (
    Case(256, 8, 8, "eager", True),
    Case(256, 8, 8, "sdpa", True),
    Case(256, 8, 8, "eager", False),
    Case(256, 8, 16, "eager", True),
    Case(192, 6, 8, "eager", True),
    Case(128, 4, 8, "eager", True),
)


def training_pass(case: Case) -> Callable[[], None]:
    """A function that does one forward and backward pass."""
    config = CLIPVisionConfig(
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        image_size=_SIZE,
        patch_size=case.patch,
    )
    model = CLIPVisionModel(config)
    model.set_attn_implementation(case.attention)
    pixels = torch.randn(_BATCH, 3, _SIZE, _SIZE)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
            pooled = model(pixel_values=pixels).pooler_output
        pooled.float().square().mean().backward()

    return run


def main() -> int:
    """Measure, print a table, write the figures."""
    args = options(__doc__ or "").parse_args()
    rounds = 3 if args.quick else 12
    passes = [training_pass(case) for case in _CASES]
    for run in passes:
        run()
    seconds = np.empty((rounds, len(passes)))
    for number in range(rounds):
        order = range(len(passes)) if number % 2 else reversed(range(len(passes)))
        for at in order:
            start = time.perf_counter()
            passes[at]()
            seconds[number, at] = time.perf_counter() - start
    rates = _BATCH / np.median(seconds, axis=0)
    ratios = np.median(seconds[:, :1] / seconds, axis=0)
    print(f"{'tower':<32}{'images/s':>10}{'of the first':>14}")
    for case, rate, ratio in zip(_CASES, rates, ratios, strict=True):
        print(f"{case.name:<32}{rate:>10.0f}{ratio:>14.2f}")
    rows = [
        asdict(case) | {"images_per_s": float(rate), "of_the_first": float(ratio)}
        for case, rate, ratio in zip(_CASES, rates, ratios, strict=True)
    ]
    return finish([], args.out, threads=torch.get_num_threads(), rows=rows)


if __name__ == "__main__":
    sys.exit(main())
