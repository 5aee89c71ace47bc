"""`edgeclip distill` in two processes against one, and after a kill; on a GPU its speed.

Both are the public command, cache included, started as `torchrun` would start it (gloo on a CPU),
with the same batch of all processes together and in float32. One run of two processes is killed
in the middle and started again.

With an NVIDIA GPU it also measures pictures per second on it, with the cache and with the teacher
online, in bfloat16; without one the table says "not run".

Bars: losses differ by at most 1e-5; the weights after a kill are equal bit by bit.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bars import Rule, finish, hold, options, say
from safetensors.torch import load_file
from torch import Tensor

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.batch_losses import embed_batch
from edgeclip.compress.train.distillation_batches import DistillationBatches
from edgeclip.compress.train.loss_terms import TeacherRows
from edgeclip.compress.train.losses import LossWeights, distillation_losses
from edgeclip.compress.train.pretrain import TeacherShape, new_teacher
from edgeclip.compress.train.train_loop import BatchPart, TrainSettings, read_log
from edgeclip.runtime.console import columns

BARS: dict[str, Rule] = {
    "losses of two processes apart": ("<=", 1e-5, ""),
    "weights and losses that a kill changes": ("<=", 0, ""),
}

_SMALL = TeacherShape(
    image_size=32, image_width=64, image_layers=4, text_width=64, text_layers=2, dim=64
)


def command(teacher: Path, out: Path, steps: int) -> list[str]:
    """The words of a small distillation that writes a checkpoint after every step."""
    words = ["-m", "edgeclip.runtime.cli.main", "distill", "--teacher", str(teacher)]
    words += ["--count", "512", "--views", "2", "--steps", str(steps), "--batch-size", "32"]
    words += ["--compute", "fp32", "--checkpoint-seconds", "0.000001", "--workers", "1"]
    return [sys.executable, *words, "--out", str(out)]


def start(words: list[str], count: int) -> list[subprocess.Popen[bytes]]:
    """Start `count` processes of one run, each told its number as by `torchrun`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(count):
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        if count > 1:
            env |= {name: str(value) for name, value in told.items()}
        started.append(
            subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        )
    return started


def run(words: list[str], count: int) -> None:
    """Run to the end.

    Raises:
        RuntimeError: a process failed.
    """
    ended = [process.wait() for process in start(words, count)]
    if any(ended):
        raise RuntimeError(f"{count} processes ended with {ended}")


def kill_in_the_middle(words: list[str], log: Path, steps: int) -> int:
    """Start two processes, and kill both when half of the steps are done; the steps logged."""
    started = start(words, 2)
    half = f"checkpoint-{steps // 2}"
    while not any(_number(path) >= steps // 2 for path in log.parent.glob("checkpoint-*")):
        if any(process.poll() is not None for process in started):
            raise RuntimeError(f"a process ended before {half}")
        time.sleep(0.01)
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return max(_number(path) for path in log.parent.glob("checkpoint-*"))


def _number(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def losses(run_folder: Path) -> list[float]:
    return [line["total"] for line in read_log(run_folder / "log.jsonl")]


def gpu_rates(quick: bool) -> list[tuple[str, float]]:
    """Pictures per second of training steps on a GPU in bfloat16, in turns: cached and online.

    Batches are made before, so the figures are of the device alone.
    """
    device = torch.device("cuda")
    shape = TeacherShape(
        image_size=224,
        patch_size=16,
        image_width=768,
        image_layers=12,
        text_width=512,
        text_layers=12,
        dim=512,
        vocab_size=4096,
    )
    teacher = new_teacher(shape, seed=0).eval().to(device)
    source = EmojiSource("train", 512, size=224)
    batch_size = 256
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(teacher, source, Path(folder) / "cache")
        sampling = Sampling(parts_of(source), held_out=0)
        settings = TrainSettings(steps=1, batch_size=batch_size)
        student = new_student(teacher, StudentShape()).to(device).train()
        batches = DistillationBatches(student, [cache], source, sampling, settings)
        held = [batches(BatchPart(step, 0, 1)) for step in range(2)]
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], fused=True)

    def step(number: int, *, online: bool) -> None:
        batch = held[number % len(held)]
        inputs = {name: rows.to(device) for name, rows in batch.inputs.items()}
        targets = {name: rows.to(device) for name, rows in batch.targets.items()}
        with torch.autocast("cuda", torch.bfloat16):
            if online:
                with torch.no_grad():
                    theirs = embed_batch(teacher, inputs)
                targets |= {f"{name} 0": rows for name, rows in theirs.items()}
            found = embed_batch(student, inputs)
        rows: dict[str, Tensor] = distillation_losses(
            LossWeights(),
            image=found["image"],
            text=found["text"],
            teachers=[
                TeacherRows(
                    image=targets["image 0"],
                    text=targets["text 0"],
                    scale=cache.settings.logit_scale,
                )
            ],
        )
        optimizer.zero_grad(set_to_none=True)
        rows["total"].backward()
        optimizer.step()
        torch.cuda.synchronize()

    rates: dict[str, list[float]] = {"cached": [], "online": []}
    for number in range(5 if quick else 40):
        for name, run_step in (
            ("cached", partial(step, online=False)),
            ("online", partial(step, online=True)),
        ):
            begin = time.perf_counter()
            run_step(number)
            if number >= 3:
                rates[name].append(batch_size / (time.perf_counter() - begin))
    return [(name, float(np.median(own))) for name, own in rates.items()]


def main() -> int:
    args = options(__doc__).parse_args()
    steps = 12 if args.quick else 60
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        teacher: DualEncoder = new_teacher(_SMALL, seed=0).eval()
        teacher.save(place / "teacher")
        words = {name: command(place / "teacher", place / name, steps) for name in ("1", "2", "k")}
        for name, count in (("1", 1), ("2", 2)):
            say(f"{name} processes")
            run(words[name], count)
        say("two processes, killed")
        killed = kill_in_the_middle(words["k"], place / "k-run" / "log.jsonl", steps)
        run(words["k"], 2)
        one, two, resumed = (losses(place / f"{name}-run") for name in ("1", "2", "k"))
        weights = [load_file(place / name / "model.safetensors") for name in ("2", "k")]
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    differ = sum(not torch.equal(own, weights[1][name]) for name, own in weights[0].items())
    differ += sum(a != b for a, b in zip(two, resumed, strict=True))
    print(f"{steps} steps: losses of one and two processes differ by at most {apart:.2g}")
    print(f"killed at step {killed}, resumed: {differ} weights and losses differ")
    rates: Any = "not run"
    if torch.cuda.is_available():
        rates = gpu_rates(args.quick)
        cells = [(name, f"{rate:.0f}") for name, rate in rates]
        print(columns([("step on a GPU, bfloat16", "pictures/s"), *cells]))
    else:
        print("pictures per second on a GPU: not run, there is none")
    bars = [
        hold(BARS, "losses of two processes apart", apart),
        hold(BARS, "weights and losses that a kill changes", differ),
    ]
    return finish(bars, args.out, steps=steps, killed_at=killed, gpu=rates)


if __name__ == "__main__":
    sys.exit(main())
