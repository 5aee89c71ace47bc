"""What training data costs: the sampling of a step, a picture from JPEG to student input, workers.

Pictures of 500 x 375 pixels, as ImageNet has them (130 kB each), and of 12 megapixels, as phones
take them (2 MB), have a spectrum of 1/f as photographs have; the large ones are blurred as by a
lens, since what decoding takes goes by the bytes of a file. An augmented view of 224 pixels,
normalised, is made of each:

- before: as views were made before, resized at their own size, coloured there in three passes and
  resized again; from a folder
- now: `view_crop` of a picture from a `ShardSource`
- webdataset, datasets: what these packages decode, cropped and resized by Pillow in one step, and
  coloured when small

All ways take the same pictures in turns; ratios are of CPU seconds in one process, of a round each.
Workers are those of torch's DataLoader, timed by the wall clock: other programs on the machine
count. Sampling is compared with a shuffle that is written down.
"""

import io
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import webdataset
from _bars import Bar, Rule, finish, hold, options, say, span
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

from edgeclip.compress.data.augmentation import Augmentation, keep_picture_memory, view_crop
from edgeclip.compress.data.sampling import Part, Sampling
from edgeclip.compress.data.shards import ShardSource
from edgeclip.compress.data.sources import FolderSource, Source, seed_of
from edgeclip.profiles.record.timing_statistics import estimate_mean_log
from edgeclip.runtime.console import columns
from edgeclip.runtime.inputs.preprocess import normalise, resize_and_crop
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "pictures_500x375": (">=", 1.5, "times before"),
    "pictures_12MP": (">=", 1.5, "times before"),
    "two_workers": (">=", 1.8, "times one"),
    "cpu_a_picture_with_two_workers": ("<=", 1.1, "times one"),
    "batches_of_one_and_two_workers_are_equal": (">=", 1, ""),
    "sampling_1e9_beside_1e4_items": ("<=", 1.25, "times"),
}

_SPEC = ImageSpec(size=224, resize=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_AUGMENTATION = Augmentation()
_STEP = 1024  # items of a step whose sampling is timed
# (width, height), and the frequency in 1/pixel at which the lens leaves 1/e.
_SIZES = {"500x375": ((500, 375), np.inf), "12 MP": ((4000, 3000), 0.072)}
_BATCH = 32

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is measured."""

    rounds: int
    pictures: dict[str, int]
    steps: int  # of a DataLoader in a round
    worker_rounds: int


FULL = Amount(rounds=15, pictures={"500x375": 48, "12 MP": 6}, steps=60, worker_rounds=7)
QUICK = Amount(rounds=4, pictures={"500x375": 16, "12 MP": 2}, steps=12, worker_rounds=2)


def photograph(size: tuple[int, int], blur: float, draw: np.random.Generator) -> bytes:
    """A JPEG file of a random texture whose amplitudes fall as 1/f, and more beyond `blur`."""
    width, height = size
    rows, lines = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, lines)
    falling = np.exp(-((frequency / blur) ** 2)) / np.maximum(frequency, 1 / max(size))
    channels = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * draw.random(falling.shape))
        channels.append(np.fft.irfft2(falling * phases, s=(height, width)))
    field = np.stack(channels, axis=-1)
    pixels = np.clip(127 + 55 * field / field.std(), 0, 255).astype(np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "JPEG", quality=90)
    return held.getvalue()


def write(folder: Path, files: Sequence[bytes]) -> None:
    """Write the same pictures as a folder, a shard and a data set."""
    (folder / "pictures").mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "pictures.tar")) as writer:
        for number, data in enumerate(files):
            (folder / "pictures" / f"{number:06d}.jpg").write_bytes(data)
            writer.write({"__key__": f"{number:06d}", "jpg": data, "txt": f"picture {number}"})
    rows = [{"image": {"bytes": data, "path": None}} for data in files]
    table = datasets.Dataset.from_list(rows, datasets.Features(image=datasets.Image()))
    table.save_to_disk(folder / "saved")


def before(source: Source) -> Iterator[Float]:
    for index in range(len(source)):
        image = source[index].image
        rng = np.random.default_rng(np.random.SeedSequence((0, seed_of(source, index), 1)))
        changed = _resized(image, image.size, rng, Image.Resampling.BILINEAR)
        yield _normalised(resize_and_crop(_coloured(changed, rng), _SPEC))


def now(source: Source) -> Iterator[Float]:
    for index in range(len(source)):
        yield _normalised(_view(source, index, 1))


def by_webdataset(path: Path) -> Iterator[Float]:
    for number, sample in enumerate(
        webdataset.WebDataset(str(path), shardshuffle=False).decode("pil")
    ):
        yield _with_pillow(sample["jpg"], number)


def by_datasets(table: Any) -> Iterator[Float]:
    for number in range(len(table)):
        yield _with_pillow(table[number]["image"].convert("RGB"), number)


def _view(source: Source, index: int, view: int) -> NDArray[np.uint8]:
    seed = seed_of(source, index)
    return view_crop(source[index].image, _SPEC, _AUGMENTATION, picture_seed=seed, view=view)


def _with_pillow(image: Image.Image, number: int) -> Float:
    rng = np.random.default_rng(number)
    side = (_SPEC.size, _SPEC.size)
    small = _resized(image, side, rng, Image.Resampling.BICUBIC)
    return _normalised(np.asarray(_coloured(small, rng)))


def _resized(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    resample: Image.Resampling,
) -> Image.Image:
    width, height = (side * rng.uniform(0.9, 1) for side in image.size)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(size, resample, box=box)


def _coloured(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(rng.uniform(0.8, 1.2)))
    return image


def _normalised(pixels: NDArray[np.uint8]) -> Float:
    found: Float = normalise(pixels[None], _SPEC)[0]
    return found


def picture_costs(name: str, folder: Path, amount: Amount) -> tuple[list[dict[str, Any]], Interval]:
    """Return a row for each way, and how many times as fast as before it is now."""
    source = ShardSource([folder / "pictures.tar"], min_side=_SPEC.resize)
    old = FolderSource(folder / "pictures", min_side=_SPEC.resize)
    table = datasets.load_from_disk(str(folder / "saved"))
    ways: dict[str, Callable[[], Iterator[Float]]] = {
        "before": lambda: before(old),
        "now": lambda: now(source),
        "webdataset": lambda: by_webdataset(folder / "pictures.tar"),
        "datasets": lambda: by_datasets(table),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(amount.rounds + 1):
        for way in sorted(ways, reverse=bool(number % 2)):
            keep_picture_memory(4 if way == "now" else 0)
            started = time.process_time()
            count = sum(1 for _ in ways[way]())
            assert count == len(source)
            if number:  # the first round fills caches
                seconds[way].append((time.process_time() - started) / count)
    ratios = {
        way: estimate_mean_log(np.array(seconds["before"]) / np.array(taken)).interval
        for way, taken in seconds.items()
    }
    rows = [
        {
            "pictures": name,
            "way": way,
            "per_cpu_second": 1 / float(np.median(seconds[way])),
            "times_before": ratio,
        }
        for way, ratio in ratios.items()
    ]
    return rows, ratios["now"]


class Steps(Dataset[tuple[NDArray[np.int64], NDArray[np.uint8]]]):
    """The batches of a run, each made of its number alone."""

    def __init__(self, source: Source, steps: int) -> None:
        self._source = source
        self._sampling = Sampling([Part(len(source))], seed=1, held_out=0)
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        index, epoch = self._sampling.items(step * _BATCH, _BATCH)
        pairs = zip(index.tolist(), (epoch + 1).tolist(), strict=True)
        return index, np.stack([_view(self._source, item, view) for item, view in pairs])


@dataclass(frozen=True, slots=True)
class Workers:
    """What two workers do beside one.

    Attributes:
        speed: how many times as many pictures a second.
        cpu: how many times the CPU seconds of a picture, which other programs hardly change.
        same: whether both make the same batches.
    """

    speed: Interval
    cpu: Interval
    same: bool


def two_workers(folder: Path, amount: Amount) -> Workers:
    source = ShardSource([folder / "pictures.tar"], min_side=_SPEC.resize)
    source.identity  # noqa: B018, opens the index before the workers are forked
    loaders: dict[int, DataLoader[Any]] = {
        workers: DataLoader(
            Steps(source, amount.steps),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=lambda _: keep_picture_memory(),
        )
        for workers in (1, 2)
    }
    first, other = (next(iter(run)) for run in loaders.values())
    same = all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    rates: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    for number in range(amount.worker_rounds):
        for workers in sorted(loaders, reverse=bool(number % 2)):
            spent, began = _cpu_of_children(), time.perf_counter()
            for step, _ in enumerate(loaders[workers]):
                if step == 2 * workers:  # what is in stock at the start is not counted
                    began = time.perf_counter()
            counted = amount.steps - 2 * workers - 1
            rates[workers].append(counted * _BATCH / (time.perf_counter() - began))
            cpu[workers].append(_cpu_of_children() - spent)
    one, two = (np.median(rates[workers]) for workers in (1, 2))
    say(
        f"workers: {one:.0f} pictures/s with one, {two:.0f} with two; load {os.getloadavg()[0]:.1f}"
    )
    return Workers(
        speed=estimate_mean_log(np.array(rates[2]) / np.array(rates[1])).interval,
        cpu=estimate_mean_log(np.array(cpu[2]) / np.array(cpu[1])).interval,
        same=same,
    )


def _cpu_of_children() -> float:
    """CPU seconds of the workers that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def sampling_costs(amount: Amount) -> tuple[list[dict[str, Any]], Interval]:
    """Return the milliseconds of a step by number of items, and 10^9 items beside 10^4."""
    counts = (10**4, 10**6, 10**9)
    samplings = {count: Sampling([Part(count)], seed=0) for count in counts}
    repeats = 20
    taken: dict[tuple[str, int], list[float]] = {}
    for number in range(3 * amount.rounds):
        for count in sorted(counts, reverse=bool(number % 2)):
            started = time.process_time()
            for step in range(repeats):
                samplings[count].items(step * _STEP, _STEP)
            spent = (time.process_time() - started) / repeats
            taken.setdefault(("now", count), []).append(spent)
            if count <= 10**6 and number < amount.rounds:
                started = time.process_time()
                np.random.default_rng(number).permutation(count)[:_STEP]
                taken.setdefault(("before", count), []).append(time.process_time() - started)
    rows = [
        {"way": way, "items": count, "step_ms": 1e3 * float(np.median(values))}
        for (way, count), values in taken.items()
    ]
    ratios = np.array(taken["now", 10**9]) / np.array(taken["now", 10**4])
    return rows, estimate_mean_log(ratios).interval


def main() -> int:
    args = options(__doc__).parse_args()
    amount = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    draw = np.random.default_rng(0)
    bars: list[Bar] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGECLIP_CACHE"] = f"{scratch}/cache"
        for name, (size, blur) in _SIZES.items():
            files = [photograph(size, blur, draw) for _ in range(amount.pictures[name])]
            kilobytes = np.mean([len(data) for data in files]) / 1e3
            say(f"{name}: {len(files)} pictures of {kilobytes:.0f} kB, {amount.rounds} rounds")
            folder = Path(scratch, name.replace(" ", ""))
            write(folder, files)
            found, faster = picture_costs(name, folder, amount)
            rows += found
            bars.append(hold(BARS, f"pictures_{name.replace(' ', '')}", faster))
        workers = two_workers(Path(scratch, "500x375"), amount)
    sampled, ratio = sampling_costs(amount)
    cells = [("pictures", "way", "per CPU second", "times before")]
    for row in rows:
        cells.append(
            (
                row["pictures"],
                row["way"],
                f"{row['per_cpu_second']:.0f}",
                span(row["times_before"], 2),
            )
        )
    print(columns(cells))
    cells = [("sampling", "items", "ms a step", "")]
    cells += [(row["way"], f"{row['items']:,}", f"{row['step_ms']:.3f}", "") for row in sampled]
    print("\n" + columns(cells))
    bars += [
        hold(BARS, "two_workers", workers.speed),
        hold(BARS, "cpu_a_picture_with_two_workers", workers.cpu),
        hold(BARS, "batches_of_one_and_two_workers_are_equal", float(workers.same)),
        hold(BARS, "sampling_1e9_beside_1e4_items", ratio),
    ]
    return finish(
        bars, args.out, pictures=rows, sampling=sampled, workers=workers, load=os.getloadavg()
    )


if __name__ == "__main__":
    sys.exit(main())
