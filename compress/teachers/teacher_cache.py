"""Keep the teacher's embeddings of pictures and captions on disk."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from edgeclip.compress.compute import autocast, fused_attention
from edgeclip.compress.data.augmentation import Augmentation, view_crop
from edgeclip.compress.data.loader import default_workers, killed_workers_explained, load
from edgeclip.compress.data.sources import Source, captions_of, seed_of
from edgeclip.compress.processes import processes
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.runtime.bundle.files import atomic_directory, atomic_file, require_space
from edgeclip.runtime.bundle.rows import RowFile, row_bytes
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad, report_bad
from edgeclip.runtime.spec import ImageSpec

_log = logging.getLogger(__name__)

_SETTINGS = "cache.json"
_ORDER, _ORDER_FILES = "order.json", ("images.int64", "starts.int64", "texts.int64")
_PATCH_FILE = "patches.int64"
_NONE = np.empty(0, np.int64)
_BATCH = 64
_VERSION = 2  # of how views are made
Float16 = NDArray[np.float16]
# Adds the keys of pictures, the keys of their captions, and what was wrong with unreadable ones.
_Write = Callable[[Sequence[bytes | None], Sequence[Sequence[bytes]], dict[int, str]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIdentity:
    """What all embeddings of a cache depend on, beside the picture or the caption itself.

    Attributes:
        space: fingerprint of the teacher's embedding space.
        views: number of augmented views of each picture.
        dim: length of an embedding.
        augmentation: how the views are made.
        logit_scale: the teacher's logit scale.
        logit_bias: its logit bias, if it is a SigLIP.
    """

    space: str
    views: int
    dim: int
    augmentation: Augmentation
    logit_scale: float
    logit_bias: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings(CacheIdentity):
    """The identity of a source's embeddings: equal settings mean equal embeddings.

    Attributes:
        source: identity of the data.
        count: number of pictures.
        captions: whether any picture has a caption.
    """

    source: str
    count: int
    captions: bool


class TeacherCache:
    """Embeddings of every view and caption of a source, L2-normalised, read from disk when needed.

    A worker process may have a copy of it.

    Attributes:
        settings: what the embeddings belong to.
        unreadable: indices of the pictures that could not be read, and have no embeddings.
    """

    def __init__(
        self,
        settings: CacheSettings,
        order: "_Order",
        images: RowFile,
        texts: RowFile,
        patches: RowFile | None = None,
    ) -> None:
        self.settings = settings
        self.unreadable = tuple(sorted(order.bad))
        self._order, self._images, self._texts = order, images, texts
        self._patches = patches

    @property
    def has_patches(self) -> bool:
        """Whether `patches` can be asked for, see `build_cache`."""
        return self._patches is not None

    def patches(self, indices: Sequence[int], views: int | Sequence[int] = 0) -> Float16:
        """Return the patches of a view of each of some pictures: float16 [N, patches, width].

        Raises:
            ValueError: the cache has none.
        """
        if self._patches is None or self._order.patches is None:
            raise ValueError("the cache was opened without patches")
        rows = self._patches.at(np.asarray(self._order.patches[np.asarray(indices, np.int64)]))
        found: Float16 = rows[np.arange(len(rows)), views]
        return found

    def image(self, indices: Sequence[int], views: int | Sequence[int] = 0) -> Float16:
        """Return a view of each of some readable pictures: float16 [N, dim]."""
        places = np.asarray(indices, np.int64)  # an empty list has no type of its own
        rows = self._images.at(np.asarray(self._order.images[places]))
        found: Float16 = rows[np.arange(len(rows)), views]
        return found

    def caption_counts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Return how many captions each of some pictures has: int64 [N]."""
        places = np.asarray(indices, np.int64)
        counts: NDArray[np.int64] = np.asarray(self._order.starts[places + 1])
        return counts - np.asarray(self._order.starts[places])

    def text(self, indices: Sequence[int], numbers: int | Sequence[int] = 0) -> Float16:
        """Return one caption, by its number, of each of some pictures: float16 [N, dim]."""
        found: Float16 = self._texts.at(self.text_numbers(indices, numbers))
        return found

    def text_numbers(
        self, indices: Sequence[int], numbers: int | Sequence[int] = 0
    ) -> NDArray[np.int64]:
        """Return a number of each such caption, the same for equal texts: int64 [N]."""
        starts = self._order.starts[np.asarray(indices, np.int64)]
        places = np.asarray(starts) + np.asarray(numbers, np.int64)
        return np.asarray(self._order.texts[places], np.int64)


def spread_rows(rows: Float16, places: NDArray[np.int64], count: int) -> Tensor:
    """Put normalised rows at their places among `count`, zeros elsewhere: float32 [count, dim]."""
    spread = torch.zeros(count, rows.shape[1])
    found = torch.from_numpy(rows.astype(np.float32))
    spread[torch.from_numpy(places)] = torch.nn.functional.normalize(found, dim=-1)
    return spread  # float16 had rounded lengths off 1


@dataclass(frozen=True, slots=True)
class _Order:
    """Which records of the row files belong to the items of a source, by their index.

    Attributes:
        images: number of the record of each picture, -1 for an unreadable one, int64 [count].
        starts: where the captions of each picture begin in `texts`, int64 [count + 1].
        texts: number of the record of each caption, int64.
        bad: unreadable pictures by their index, with the reason.
        patches: number of the record of each picture's patches, as `images`; None for no patches.
    """

    images: NDArray[np.int64]
    starts: NDArray[np.int64]
    texts: NDArray[np.int64]
    bad: dict[int, str]
    patches: NDArray[np.int64] | None = None


def build_cache(
    teacher: DualEncoder,
    source: Source,
    folder: Path,
    *,
    views: int | None = None,
    augmentation: Augmentation | None = None,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
    workers: int | None = None,
    patches: bool = False,
) -> TeacherCache:
    """Compute the embeddings that `folder` lacks, and return those of the source.

    The folder holds `image.rows` and `text.rows` (`RowFile`), where a picture's embeddings lie
    under its content and a caption's under its SHA-256. So a new, changed or mended picture
    computes itself alone, and a run that was killed loses the batch in hand. `orders` tells which
    rows belong to which item of a source, so that data known already are not looked at again.
    Memory does not grow with the data, see `RowFile`.

    Several processes (see `Processes`) share the work; the first one writes.

    Args:
        views, augmentation: None takes those of an existing cache; for a new cache, one view and
            `Augmentation()`.
        max_bad: how many pictures may be unreadable; they are skipped and named.
        workers: processes that read pictures; None for `default_workers`.
        patches: keep the image tower's patches of every view too, in `patch.rows`. They take much
            room, which is said beforehand. Each is normalised to mean 0 and variance 1, as some
            towers have a few dimensions that are far larger than all others.

    Raises:
        ConfigError: `folder` holds a cache of another teacher or augmentation, or there is
            nothing to cache.
        InputError: more pictures are unreadable than `max_bad` allows, or the disk is full; what
            was computed is kept.
    """
    existing = _read_identity(folder) if (folder / _SETTINGS).exists() else None
    if views is None:
        views = existing.views if existing else 1
    if augmentation is None:
        augmentation = existing.augmentation if existing else Augmentation()
    count = len(source)
    if count < 1 or views < 1:
        raise ConfigError(f"a cache needs pictures and views, got {count} and {views}")
    scale = teacher.spec.logit_scale
    if existing and math.isclose(existing.logit_scale, scale, rel_tol=1e-6):
        scale = existing.logit_scale  # exp() differs between machines
    identity = CacheIdentity(
        space=space_fingerprint(teacher),
        views=views,
        dim=teacher.spec.dim,
        augmentation=augmentation,
        logit_scale=scale,
        logit_bias=teacher.logit_bias,
    )
    image_file, text_file = folder / "image.rows", folder / "text.rows"
    image_row, text_row = (views, identity.dim), (identity.dim,)
    # The rows say themselves whose they are, for somebody may delete cache.json alone.
    of_texts = {"space": identity.space}
    of_images = {**of_texts, "augmentation": asdict(augmentation), "version": _VERSION}
    needed = row_bytes(count, image_row, np.float16)
    needed += row_bytes(count, text_row, np.float16) if source.has_captions else 0
    patch_file, patch_row = folder / "patch.rows", (views, *_patch_shape(teacher, patches))
    if patches:
        of_patches = row_bytes(count, patch_row, np.float16)
        _log.info("the teacher's patches take %.1f GB in %s", of_patches / 1e9, patch_file)
        needed += of_patches
    files = (image_file, text_file, *([patch_file] if patches else []))
    there = sum(path.stat().st_size for path in files if path.exists())
    require_space(folder, max(0, needed - there))
    if existing is not None:
        _refuse_other(folder, existing, identity)
    images = _open_rows(image_file, image_row, of_images)
    texts = _open_rows(text_file, text_row, of_texts)
    squares = _open_rows(patch_file, patch_row, of_images) if patches else None
    team = processes()
    if existing is None and team.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        _write_identity(folder, identity)
    place = folder / "orders" / hashlib.sha256(source.identity.encode()).hexdigest()[:32]
    known = _read_order(place, images, texts, squares)
    # What could not be read may have been mended, or its server is there again.
    is_known = known is not None and not any(_can_be_read(source, index) for index in known.bad)
    if not team.from_first(is_known):
        make = _Chunks(source, teacher.image_spec, identity, images, texts, squares)
        steps = load(
            make,
            range(team.number, -(-count // _BATCH), team.count),
            workers=default_workers() if workers is None else workers,
        )
        with ExitStack() as stack:
            for opened in (images, texts, squares, steps):
                if opened is not None:
                    stack.enter_context(closing(opened))
            stack.enter_context(fast_inference(teacher))
            _fill(teacher, images, texts, squares, steps, count, views, place)
        team.wait()
        # The first process has written behind what the others know, and none needs keys any more.
        images = _open_rows(image_file, image_row, of_images)
        texts = _open_rows(text_file, text_row, of_texts)
        squares = _open_rows(patch_file, patch_row, of_images) if patches else None
    found = _read_order(place, images, texts, squares)
    if found is None and not team.is_first and not place.exists():
        raise InputError(
            f"{folder} lacks what the first process wrote: give a --cache on a disk that all "
            "machines share"
        )
    if found is None:
        raise InputError(f"{place} was altered while it was read: run the command again")
    report_bad(list(found.bad.values()), count, max_bad)
    return TeacherCache(
        CacheSettings(
            **{field.name: getattr(identity, field.name) for field in fields(identity)},
            source=source.identity,
            count=count,
            captions=source.has_captions,
        ),
        found,
        images,
        texts,
        squares,
    )


def _patch_shape(teacher: DualEncoder, patches: bool) -> tuple[int, ...]:
    """Return how many patches the teacher's tower has, and their width; nothing if not wanted."""
    if not patches:
        return ()
    size = teacher.image_spec.size
    with fast_inference(teacher):
        black = torch.zeros(1, 3, size, size, device=teacher.device)
        return tuple(teacher.embed_image_and_patches(black)[1].shape[1:])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some pictures that follow one another, as far as they are not cached yet.

    Attributes:
        keys: of each picture; None for an unreadable one.
        crops: of each view of a new picture, uint8 [views, size, size, 3], by its key.
        captions: keys of the captions of each picture.
        texts: new captions by their key.
        bad: unreadable pictures by their index, with the reason.
    """

    keys: list[bytes | None]
    crops: dict[bytes, NDArray[np.uint8]]
    captions: list[list[bytes]]
    texts: dict[bytes, str]
    bad: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Reads the pictures of a chunk by its number, in a worker process."""

    source: Source
    spec: ImageSpec
    identity: CacheIdentity
    images: RowFile
    texts: RowFile
    patches: RowFile | None

    def __call__(self, number: int) -> _Chunk:
        first = number * _BATCH
        chunk = _Chunk([], {}, [], {}, {})
        for index in range(first, min(first + _BATCH, len(self.source))):
            try:
                key = bytes.fromhex(self.source.content(index))
                lacks = key not in self.images
                lacks = lacks or (self.patches is not None and key not in self.patches)
                if lacks and key not in chunk.crops:
                    chunk.crops[key] = self._crops(index)
            except InputError as error:
                chunk.bad[index] = str(error)
                chunk.keys.append(None)
                chunk.captions.append([])
                continue
            chunk.keys.append(key)
            captions = self.source.captions(index)
            keys = [_caption_key(caption) for caption in captions]
            chunk.captions.append(keys)
            own = dict(zip(keys, captions, strict=True))
            chunk.texts.update({key: text for key, text in own.items() if key not in self.texts})
        return chunk

    def _crops(self, index: int) -> NDArray[np.uint8]:
        image, seed = self.source[index].image, seed_of(self.source, index)
        how = self.identity.augmentation
        return np.stack(
            [
                view_crop(image, self.spec, how, picture_seed=seed, view=view)
                for view in range(self.identity.views)
            ]
        )


def _fill(
    teacher: DualEncoder,
    images: RowFile,
    texts: RowFile,
    patches: RowFile | None,
    chunks: Iterator[_Chunk],
    count: int,
    views: int,
    place: Path,
) -> None:
    """Embed what the chunks hold of new pictures and captions, and write the order of all."""
    team = processes()
    rounds = -(-count // (_BATCH * team.count))
    bar = tqdm(
        total=count * views,
        desc="teacher cache",
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not team.shows_bars,
    )
    with killed_workers_explained(), bar, _order_writer(place, images, texts, patches) as write:
        try:
            for _ in range(rounds):
                chunk = next(chunks, None)
                made = (
                    None if chunk is None else _embed_chunk(teacher, chunk, images, texts, patches)
                )
                for own in team.gather_objects(made):
                    if own is None or not team.is_first:
                        continue
                    held = ((images, own.images), (texts, own.texts), (patches, own.patches))
                    for file, rows in held:
                        if file is None:
                            continue
                        new = {key: row for key, row in rows.items() if key not in file}
                        if new:
                            file.append(tuple(new), np.stack(list(new.values())))
                    write(own.keys, own.captions, own.bad)
                    bar.update(len(own.keys) * views)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; what was embedded is kept in {images.path.parent}, so run it again to "
                "go on"
            ) from None


@dataclass(frozen=True, slots=True)
class _Embedded:
    """A chunk after the teacher saw it: the rows of new pictures and captions by their key."""

    keys: list[bytes | None]
    captions: list[list[bytes]]
    bad: dict[int, str]
    images: dict[bytes, Float16]
    texts: dict[bytes, Float16]
    patches: dict[bytes, Float16]


def _embed_chunk(
    teacher: DualEncoder,
    chunk: _Chunk,
    images: RowFile,
    texts: RowFile,
    patches: RowFile | None,
) -> _Embedded:
    # What came into the files since the worker looked is not embedded again.
    crops = {
        key: own
        for key, own in chunk.crops.items()
        if key not in images or (patches is not None and key not in patches)
    }
    captions = {key: text for key, text in chunk.texts.items() if key not in texts}
    image_rows: dict[bytes, Float16] = {}
    patch_rows: dict[bytes, Float16] = {}
    if crops:
        every = np.stack(list(crops.values()), axis=1)  # [views, N, size, size, 3]
        squares = []
        views = []
        for own in every:
            pixels = teacher.normalise(own)
            if patches is None:
                views.append(_half(teacher.embed_image(pixels)))
                continue
            image, tokens = teacher.embed_image_and_patches(pixels)
            views.append(_half(image))
            squares.append(_half(torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])))
        image_rows = dict(zip(crops, np.stack(views, axis=1), strict=True))
        if squares:
            patch_rows = dict(zip(crops, np.stack(squares, axis=1), strict=True))
    text_rows: dict[bytes, Float16] = {}
    if captions:
        found = _half(teacher.embed_text(teacher.tokenize(list(captions.values()))))
        text_rows = dict(zip(captions, found, strict=True))
    return _Embedded(chunk.keys, chunk.captions, chunk.bad, image_rows, text_rows, patch_rows)


def _caption_key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()


@contextmanager
def _order_writer(
    place: Path, images: RowFile, texts: RowFile, patches: RowFile | None
) -> Iterator[_Write]:
    """Yield a function that adds chunks to an order, which is there when the block ends normally.

    In other processes than the first it is never called.
    """
    if not processes().is_first:
        yield lambda _keys, _captions, _bad: None
        return
    bad: dict[int, str] = {}
    with atomic_directory(place, replace=True, marker=_ORDER) as folder, ExitStack() as stack:
        image_file, start_file, text_file = (
            stack.enter_context((folder / name).open("wb")) for name in _ORDER_FILES
        )
        if patches is not None:
            patch_file = stack.enter_context((folder / _PATCH_FILE).open("wb"))
        start_file.write(np.zeros(1, np.int64).tobytes())
        written = 0

        def write(
            keys: Sequence[bytes | None], captions: Sequence[Sequence[bytes]], own: dict[int, str]
        ) -> None:
            nonlocal written
            bad.update(own)
            numbers = [-1 if key is None else images.number(key) for key in keys]
            image_file.write(np.array(numbers, np.int64).tobytes())
            if patches is not None:
                numbers = [-1 if key is None else patches.number(key) for key in keys]
                patch_file.write(np.array(numbers, np.int64).tobytes())
            of_texts = [texts.number(key) for each in captions for key in each]
            text_file.write(np.array(of_texts, np.int64).tobytes())
            ends = written + np.cumsum([len(each) for each in captions], dtype=np.int64)
            start_file.write(ends.tobytes())
            written = int(ends[-1])

        yield write
        meta = {"bad": bad, "image": images.fingerprint, "text": texts.fingerprint}
        if patches is not None:
            meta["patch"] = patches.fingerprint
        (folder / _ORDER).write_text(json.dumps(meta), encoding="utf-8")


def _can_be_read(source: Source, index: int) -> bool:
    try:
        source.content(index), source[index]
    except InputError:
        return False
    return True


def _read_order(
    place: Path, images: RowFile, texts: RowFile, patches: RowFile | None
) -> _Order | None:
    """Read an order; None if there is none, or the row files are others than it was made with."""
    try:
        meta = json.loads((place / _ORDER).read_text(encoding="utf-8"))
        if not images.goes_on(meta["image"]) or not texts.goes_on(meta["text"]):
            return None
        if patches is not None and not patches.goes_on(meta["patch"]):
            return None
        names = (*_ORDER_FILES, *([] if patches is None else [_PATCH_FILE]))
        found: list[NDArray[np.int64]] = [
            np.memmap(place / name, np.int64, "r") if (place / name).stat().st_size else _NONE
            for name in names
        ]
        bad = {int(index): str(reason) for index, reason in meta["bad"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return _Order(found[0], found[1], found[2], bad, None if patches is None else found[3])


def _open_rows(path: Path, shape: tuple[int, ...], settings: Mapping[str, object]) -> RowFile:
    mend = "delete it, and run the command that made it again"
    try:
        return RowFile(path, shape=shape, dtype=np.float16, settings=settings, mend=mend)
    except InputError as error:
        raise ConfigError(str(error)) from error


def embed_source(
    model: DualEncoder, source: Source, *, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Embed N pictures and all their M captions in full precision: float32 [N, dim], [M, dim]."""
    image, text = [], []
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(source), batch_size):
            chunk = range(first, min(first + batch_size, len(source)))
            pictures = [source[index].image for index in chunk]
            image.append(model.embed_image(model.preprocess(pictures)).cpu())
            captions_of(source, chunk)  # refuses a picture without any
            captions = [caption for index in chunk for caption in source.captions(index)]
            text.append(model.embed_text(model.tokenize(captions)).cpu())
    return torch.cat(image), torch.cat(text)


@contextmanager
def fast_inference(model: DualEncoder) -> Iterator[None]:
    """Run the block in evaluation mode, without gradients, in bfloat16 if the hardware has it."""
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            autocast("auto", model.device),
            fused_attention(model.model, model.device),
        ):
            yield
    finally:
        model.train(was_training)


def _half(embeddings: torch.Tensor) -> Float16:
    return embeddings.cpu().numpy().astype(np.float16)


def _write_identity(folder: Path, identity: CacheIdentity) -> None:
    with atomic_file(folder / _SETTINGS) as temporary:
        data = {"version": _VERSION, **asdict(identity)}
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _refuse_other(folder: Path, existing: CacheIdentity, wanted: CacheIdentity) -> None:
    found, given = asdict(existing), asdict(wanted)
    if existing.logit_bias is None:  # of a cache from before it was kept; it changes no embedding
        del given["logit_bias"]
    different = [name for name, value in given.items() if found[name] != value]
    if "space" in different:  # what else comes of the teacher's weights differs with them
        of_teacher = {"space", "dim", "logit_scale", "logit_bias"}
        different = ["teacher", *(name for name in different if name not in of_teacher)]
    if different:
        raise ConfigError(
            f"{folder} is a cache with another {', '.join(different)}: choose another "
            f"directory, or delete it"
        )


def _read_identity(folder: Path) -> CacheIdentity:
    path = folder / _SETTINGS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if isinstance(data, dict) and data.pop("version", 1) != _VERSION:
        raise ConfigError(
            f"{path} is of another version of the cache, which made augmented views otherwise: "
            "choose another directory, or delete it"
        )
    return parse(CacheIdentity, data, source=str(path))
