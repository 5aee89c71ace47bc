"""Write a cut set: a bundle's image tower cut in two at several points, in one directory."""

import io
import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EMOJI, EmojiSource
from edgeclip.export.bundle.add_to_bundle import file_records
from edgeclip.export.cuts.cut_points import FoundCut, find_cuts
from edgeclip.export.cuts.cut_tower import cut_head, cut_tail, prepare_for_cutting
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.graph_io import data_path, load_graph, write_unchecked
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import atomic_directory
from edgeclip.runtime.bundle.manifest import TowerFile
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import list_images, readable_images
from edgeclip.runtime.planning.cut_set import (
    CUTS_NAME,
    PICTURES_NAME,
    SCHEMA_VERSION,
    WEIGHTS_NAME,
    CutHead,
    CutManifest,
    CutSet,
    head_file_name,
    tail_file_name,
)
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.spec import OUTPUT_NAMES, Precision
from edgeclip.runtime.towers.tower_runner import TowerRunner, choose_precision, tower_feed

_log = logging.getLogger(__name__)

# The largest allowed difference of an embedding's value between the halves and the whole tower.
MAX_DIFFERENCE = 1e-4

_PICTURE_SIDE = 320  # of a drawn scene, larger than the input of a small tower
_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class WrittenCuts:
    """A cut set, and the largest difference of an embedding's value that cutting caused."""

    cuts: CutSet
    difference: float


def write_cuts(
    bundle: Bundle,
    out: Path,
    *,
    device: DeviceProfile,
    precision: Precision | None = None,
    points: Collection[int] | None = None,
    pictures: str | Path = EMOJI,
    count: int = 32,
    replace: bool = False,
) -> WrittenCuts:
    """Cut the image tower, compare every pair of halves with the whole, and write them.

    Args:
        bundle: the bundle to cut; its golden pictures are run.
        out: the directory to make.
        device: where the halves will run. The check runs on its CPU.
        precision: by default what the bundle chose, or the first that the device allows.
        points: numbers of the cuts to write; None for all. Cut 0 is always there.
        pictures: "emoji" for built-in scenes of the test split, or a folder of pictures to
            measure with.
        count: how many pictures, at most.
        replace: allow `out` to exist, if it is a cut set.

    Raises:
        InputError: no such cut point, no pictures, `out` may not be written, or the device
            does not allow `precision`.
        BundleError: the bundle does not hold that precision.
        ExportError: halves whose result differs from the whole tower's.
        EngineError: the graph cannot be run on this CPU.
    """
    tower = bundle.manifest.tower("image")
    file = tower.file(choose_precision(tower, device, precision))
    on_cpu = _cpu_like(device)
    opener = partial(open_engine, device=on_cpu)
    bundle.tower_bytes("image", file.precision)  # refuses what was altered
    pixels = _repeat_pictures(bundle.golden().pixels, file.batch)
    feed = tower_feed(pixels, "image", file.pixels, bundle.manifest.spec.image)
    _log.info("looking for the cuts of the %s image tower ...", file.precision)
    model = prepare_for_cutting(
        load_graph(bundle.path / file.path), OUTPUT_NAMES["image"], feed, opener
    )
    found = _chosen(find_cuts(model, feed, bundle.manifest.spec.image.size, opener), points)
    with atomic_directory(out, replace=replace, marker=CUTS_NAME) as folder:
        _write_pictures(folder / PICTURES_NAME, pictures, count)
        if (bundle.path / "config.json").is_file():  # the sizes of the tower, for predictions
            shutil.copyfile(bundle.path / "config.json", folder / "config.json")
        _log.info("writing %d cuts ...", len(found))
        _write_graphs(folder, model, found)
        manifest = _manifest(bundle, file, found, folder)
        (folder / CUTS_NAME).write_text(manifest.to_json(), encoding="utf-8")
        _log.info("running each pair of halves against the whole ...")
        whole = TowerRunner(bundle, "image", file.precision, on_cpu).run(pixels)
        difference = _check(CutSet.open(folder), pixels, whole, file, on_cpu)
    return WrittenCuts(CutSet.open(out), difference)


def _cpu_like(device: DeviceProfile) -> DeviceProfile:
    """Return a CPU with the threads of `device`, on which every precision may run."""
    return DeviceProfile(
        name="cpu",
        description="the CPU of this machine",
        engine="onnxruntime-cpu",
        precisions=("fp32", "fp16", "int8"),
        threads=device.threads,
        memory_mb=None,
        vnni=device.vnni,
    )


def _repeat_pictures(pixels: NDArray[np.uint8], batch: int | None) -> NDArray[np.uint8]:
    """Return at least two pictures, or as many as a fixed batch size takes."""
    wanted = batch or max(2, len(pixels))
    return np.take(pixels, np.arange(wanted) % len(pixels), axis=0)


def _chosen(found: Sequence[FoundCut], points: Collection[int] | None) -> tuple[FoundCut, ...]:
    numbers = {item.point.number for item in found}
    unknown = sorted(set(points or ()) - numbers)
    if unknown:
        raise InputError(
            f"there is no cut {unknown[0]}: this tower has the cuts 0 to {max(numbers)}"
        )
    wanted = numbers if points is None else {0, *points}
    return tuple(item for item in found if item.point.number in wanted)


def _write_graphs(folder: Path, model: onnx.ModelProto, found: Sequence[FoundCut]) -> None:
    """Write the weights once, and graphs that refer to them."""
    whole = folder / WEIGHTS_NAME.removesuffix("_data")
    write_unchecked(model, whole, limit=0)
    whole.unlink()
    if data_path(whole).stat().st_size == 0:
        data_path(whole).unlink()
    for cut in found:
        parts = {tail_file_name(cut.point.number): cut_tail(model, cut)}
        if cut.point.number:
            parts[head_file_name(cut.point.number)] = cut_head(model, cut)
        for name, part in parts.items():
            (folder / name).write_bytes(part.SerializeToString(deterministic=True))


def _write_pictures(folder: Path, source: str | Path, count: int) -> None:
    folder.mkdir()
    if source == EMOJI:
        scenes = EmojiSource("test", count, size=_PICTURE_SIDE, distinct=True)
        for number in range(count):
            written = io.BytesIO()
            scenes[number].image.save(written, "JPEG", quality=_JPEG_QUALITY)
            (folder / f"{number:04}.jpg").write_bytes(written.getvalue())
        return
    for number, path in enumerate(readable_images(list_images(source), most=count)):
        shutil.copyfile(path, folder / f"{number:04}{path.suffix.lower()}")


def _manifest(
    bundle: Bundle, file: TowerFile, found: Sequence[FoundCut], folder: Path
) -> CutManifest:
    spec = bundle.manifest.spec
    return CutManifest(
        schema_version=SCHEMA_VERSION,
        bundle=bundle.manifest.name,
        space=bundle.manifest.space,
        tower="image",
        precision=file.precision,
        dim=spec.dim,
        image=spec.image,
        pixels=file.pixels or "float32-nchw",
        batch=file.batch,
        needs_vnni=file.needs_vnni,
        points=tuple(item.point for item in found),
        files=file_records(folder),
    )


def _check(
    cuts: CutSet,
    pixels: NDArray[np.uint8],
    whole: NDArray[np.float32],
    file: TowerFile,
    device: DeviceProfile,
) -> float:
    """Run every pair of halves on one picture and on all; return the largest difference.

    In half precision and int8 a rounding error on the way can become a whole step, so there
    the bundle's own tolerance counts.
    """
    bound = (
        MAX_DIFFERENCE if file.precision == "fp32" else max(MAX_DIFFERENCE, file.golden_tolerance)
    )
    worst = 0.0
    for point in cuts.manifest.points:
        before, behind = CutHead(cuts, point.number, device), CutTail(cuts, point.number, device)
        for count in {1, len(pixels)}:
            embeddings = behind.embed(before.run(pixels[:count]))
            worst = max(worst, float(np.abs(embeddings - whole[:count]).max()))
        if worst > bound:
            raise ExportError(
                f"cut {point.number} ({point.name}) changes an embedding by {worst:.2g}, more than "
                f"{bound:g}: leave it out with --points"
            )
    return worst
