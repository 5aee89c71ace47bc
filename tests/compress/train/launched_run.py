"""A run of several processes, each started with this file: `RANK=0 WORLD_SIZE=2 ... OUT STEPS`.

Process 0 kills itself before step `KILL_AT`, and process 1 has `OTHER_OUT` for a directory, if the
environment says so.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from edgeclip.compress.train.kept_weights import Validation
from edgeclip.compress.train.train_loop import Rows, TrainSettings, train
from tests.compress.train.test_train_loop import _contrast, _module


def main(out: str, steps: str) -> None:
    torch.set_num_threads(1)
    module = _module()
    plain = _contrast(module)
    if os.environ.get("RANK") == "1":
        out = os.environ.get("OTHER_OUT", out)
    kill_at = int(os.environ.get("KILL_AT", "-1"))

    def losses(found: Rows, targets: Rows) -> dict[str, Tensor]:
        if int(targets["step"][0]) == kill_at and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain.losses(found, targets)

    def validate() -> Validation:
        weight = float(module.get_parameter("weight").sum())
        return Validation(score=-abs(weight - 1), values={"held_out": weight}, says="")

    settings = TrainSettings(
        steps=int(steps),
        batch_size=4,
        warmup_steps=2,
        compute="fp32",
        checkpoint_seconds=1e-6,
        workers=0,
        ema=0.9,
    )
    task = replace(plain, losses=losses, validate=validate, validate_every=3)
    train(task, settings, Path(out))
    if os.environ.get("RANK", "0") == "0":
        torch.save(module.state_dict(), Path(out) / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
