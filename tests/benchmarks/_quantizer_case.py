"""A tower that is quantized: what it is calibrated with, chosen by, judged on and timed on."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from _quantizer_race import Entrant, embed
from graph_work import padded_ids, plain_graph
from numpy.typing import NDArray

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource, Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, data_record
from edgeclip.export.gates.judge_precisions import GateInputs, judge_alone
from edgeclip.export.gates.zero_shot import emoji_zero_shot
from edgeclip.export.graph.calibration import (
    CalibrationSource,
    calibration_images,
    calibration_texts,
)
from edgeclip.export.graph.embedders import TOWERS, embed_all, torch_embedder, tower_inputs
from edgeclip.export.graph.graph_io import data_path
from edgeclip.export.quantizing.candidate_evaluator import SEARCH_WORKLOAD, open_evaluator
from edgeclip.export.quantizing.config import Config, default_config, describe
from edgeclip.export.quantizing.quantization_file import export_searched
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.search import search
from edgeclip.export.quantizing.search_task import (
    JudgedPairs,
    SearchTask,
    search_space,
    split_calibration,
)
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.quality.intervals import Interval, bootstrap
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

_BATCH = 32
OURS, PLAIN = "ours", "plain"  # forms of an input


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many pairs: to find ranges on, to steer by, to test on; and labelled pictures.

    `minutes` is when a search begins nothing new; None does without a search.
    """

    ranges: int
    steering: int
    test: int
    labelled: int
    minutes: float | None


FULL = Sizes(ranges=96, steering=128, test=400, labelled=200, minutes=4)
QUICK = Sizes(ranges=16, steering=32, test=60, labelled=40, minutes=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One tower of one model.

    Attributes:
        name: a short one.
        task: our fp32 graph of it, the device, and the data.
        plain: the plain export: all tokens through the last layer, float32 pixels.
        others: the other tower's embeddings of the test pairs, float32 [N, dim].
        folder: of its files, which are kept.
        scratch: of its inputs, which are large.
    """

    name: str
    task: SearchTask
    plain: Path
    others: FloatArray
    folder: Path
    scratch: Path

    @property
    def tower(self) -> Tower:
        """Which one."""
        return self.task.tower

    def rows(self, what: str, form: str) -> Path:
        """The file with `calibration`, `test` or `single` inputs, as `form` takes them."""
        kind = "npz" if self.tower == "text" else "npy"
        form = "" if self.tower == "text" else f"-{form}"
        return self.scratch / f"{self.name}-{self.tower}-{what}{form}.{kind}"

    def entrant(self, name: str, model: Path, form: str, **where: Any) -> Entrant:
        """A file of this tower, ready to be timed."""
        return Entrant(name=name, model=model, rows=self.rows("single", form), **where)

    def embed(self, entrant: Entrant, form: str) -> FloatArray:
        """Embeddings of all test inputs: the pairs, then the labelled pictures.

        Raises:
            EngineError: it cannot run.
        """
        asked = replace(entrant, rows=self.rows("test", form))
        return embed(asked, threads=self.task.judging_device.threads)

    def judge(self, found: FloatArray, reference: FloatArray) -> tuple[GateRecord, ...]:
        """Hold embeddings of all test inputs against those of the plain export."""
        test, count = self.task.test, len(self.others)
        (other,) = (tower for tower in TOWERS if tower != self.tower)
        zero = test.zero_shot
        judged = judge_alone(
            self.tower,
            "int8",
            {
                (self.tower, "fp32"): reference[:count],
                (self.tower, "int8"): found[:count],
                (other, "fp32"): self.others,
            },
            DEFAULT_BOUNDS["int8"],
            GateInputs(
                data=data_record(test.pairs),
                zero_shot=zero,
                labelled=None
                if zero is None
                else {"fp32": reference[count:], "int8": found[count:]},
            ),
        )
        return tuple(item.record for item in judged)

    def r1(self, found: FloatArray) -> Interval:
        """R@1 of the test pairs, mean of both directions, the other tower being in fp32."""
        both = found[: len(self.others)], self.others
        images, texts = both if self.tower == "image" else both[::-1]
        return bootstrap(pair_ranks(images, texts).hits(1))

    def write(self, config: Config, name: str) -> Path:
        """Quantize our graph; return the file."""
        path = self.folder / f"{name}.onnx"
        task, spec = self.task, self.task.student.spec
        if task.graph.pixels is not None:
            data = calibration_images(task.ranges, spec.image, task.graph.pixels)
        else:
            data = calibration_texts(task.ranges, task.student.text_tokenizer)
        quantize_graph(task.graph.path, path, config, data)
        return path


def open_case(
    name: str,
    dual: DualEncoder,
    tower: Tower,
    device: DeviceProfile,
    sizes: Sizes,
    *,
    work: Path,
    scratch: Path,
) -> Case:
    """Export a tower and prepare its data.

    Args:
        name: of the model, for files and tables.
        dual: the model, in the built-in teacher's space.
        tower: which one.
        device: this machine.
        sizes: of the data.
        work: where graphs and the search are kept between runs, for all benchmarks; those of a
            quick run are apart.
        scratch: where inputs are written.
    """
    part = "quick" if sizes.minutes is None else "full"
    folder = work / "cases" / part / f"{name}-{tower}"
    folder.mkdir(parents=True, exist_ok=True)
    size = dual.image_spec.size
    count = sizes.ranges + sizes.steering
    pairs = EmojiSource("calibration", count, size=size, distinct=True)
    ranges, steering = split_calibration(pairs, sizes.ranges)
    test = EmojiSource("test", sizes.test, size=size, distinct=True)
    labelled = None
    if tower == "image":
        teacher = DualEncoder.load(BUILT_IN_TEACHER)
        labelled = emoji_zero_shot(teacher, count=sizes.labelled, size=size)
    exported = export_searched(dual, tower, device, folder, sample=ranges)
    task = SearchTask(
        student=dual,
        graph=exported.graph,
        device=device,
        ranges=CalibrationSource(ranges),
        steering=JudgedPairs(pairs=steering),
        test=JudgedPairs(pairs=test, zero_shot=labelled),
        workload=SEARCH_WORKLOAD,
    )
    plain = folder / "plain.onnx"
    plain_graph(dual, tower, plain, one_token=False)
    (other,) = (item for item in TOWERS if item != tower)
    inputs = tower_inputs(dual, other, test)
    (others,) = embed_all(inputs, [torch_embedder(dual, other)])
    case = Case(name=name, task=task, plain=plain, others=others, folder=folder, scratch=scratch)
    _write_rows(case, "calibration", pairs)
    _write_rows(case, "test", test, *([labelled.source] if labelled else []))
    _write_rows(case, "single", test, count=1)
    return case


def chosen_config(case: Case, sizes: Sizes) -> tuple[Config, str]:
    """What our search chooses for this machine, and why; without a search, the default."""
    task = case.task
    if sizes.minutes is None:
        return default_config("int8", task.device), "the default, not searched"
    space = search_space(task.device, task.tower, here=True)
    with open_evaluator(task, case.folder / "search") as trial:
        result = search(trial, space, minutes=sizes.minutes, progress=partial(_say, case.name))
    return result.chosen.config, f"{describe(result.chosen.config)}: {result.why}"


def size_mb(path: Path) -> float:
    """Of a graph and its weights, in 10^6 bytes."""
    beside = (path, data_path(path), path.with_suffix(".bin"))
    return sum(item.stat().st_size for item in beside if item.is_file()) / 1e6


def _write_rows(case: Case, what: str, *sources: Source, count: int | None = None) -> None:
    """Write what the tower is given, in both forms."""
    student = case.task.student
    batches = chain.from_iterable(
        tower_inputs(student, case.tower, source, count=count) for source in sources
    )
    if case.tower == "text":
        values, lengths = _texts(batches, student)
        np.savez(case.rows(what, PLAIN), values=values, lengths=lengths)
        return
    crops = np.concatenate(list(batches))
    np.save(case.rows(what, OURS), crops)
    shape = (len(crops), 3, *crops.shape[1:3])
    path = case.rows(what, PLAIN)
    floats = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(crops), _BATCH):
        part = crops[start : start + _BATCH]
        feed = tower_feed(part, "image", "float32-nchw", student.spec.image)
        (floats[start : start + _BATCH],) = feed.values()
    floats.flush()


def _texts(
    batches: Iterator[NDArray[np.int64]], dual: DualEncoder
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [N, context length], padded, and how many of each belong to the text."""
    values = np.concatenate([padded_ids(dual, batch) for batch in batches])
    return values, 1 + (values == dual.spec.text.eos_id).argmax(axis=1)


def _say(name: str, line: str) -> None:
    print(f"  {name}: {line}", file=sys.stderr, flush=True)
