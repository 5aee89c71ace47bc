"""Make augmented views of pictures, and keep the teacher's embeddings of them on disk."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor
from tqdm import tqdm

from edgeclip.compress.compute import autocast
from edgeclip.compress.data.augmentation import Augmentation
from edgeclip.compress.data.sources import Source, captions_of, most_captions, seed_of, without
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.runtime.bundle.files import atomic_file, require_space
from edgeclip.runtime.bundle.rows import RowFile, row_bytes
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import DEFAULT_MAX_BAD, MaxBad, report_bad

_SETTINGS = "cache.json"
_BATCH = 64
Float16 = NDArray[np.float16]


def augment(
    image: Image.Image, augmentation: Augmentation, *, picture_seed: int, view: int
) -> Image.Image:
    """Return view number `view` of a picture; view 0 is the unchanged picture.

    `picture_seed` makes the views of one picture differ from another's, see `seed_of`.
    """
    if view == 0:
        return image
    rng = np.random.default_rng(np.random.SeedSequence((augmentation.seed, picture_seed, view)))
    width, height = (side * float(rng.uniform(augmentation.crop, 1.0)) for side in image.size)
    left = float(rng.uniform(0, image.width - width))
    top = float(rng.uniform(0, image.height - height))
    changed = image.resize(
        image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        factor = rng.uniform(1 - augmentation.colour, 1 + augmentation.colour)
        changed = enhance(changed).enhance(float(factor))
    return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIdentity:
    """What all embeddings of a cache depend on, beside the picture or the caption itself.

    Attributes:
        space: fingerprint of the teacher's embedding space.
        views: number of augmented views of each picture.
        dim: length of an embedding.
        augmentation: how the views are made.
        logit_scale: the teacher's logit scale.
    """

    space: str
    views: int
    dim: int
    augmentation: Augmentation
    logit_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings(CacheIdentity):
    """The identity of a source's embeddings: equal settings mean equal embeddings.

    Attributes:
        source: identity of the data, without the pictures that cannot be read.
        count: number of pictures.
        captions: whether the captions are embedded too.
        texts: the most captions that a picture has.
    """

    source: str
    count: int
    captions: bool
    texts: int = 1


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """Embeddings of every view and caption of a source, L2-normalised.

    `image` is float16 [count, views, dim]; `text` is float16 [count, texts, dim], zeros where a
    picture has fewer captions than others, or None for pictures without captions. `unreadable`
    holds the indices, in the source that was given, of pictures that could not be read and have no
    row; see `sources.without`.
    """

    settings: CacheSettings
    image: Float16
    text: Float16 | None
    unreadable: tuple[int, ...] = ()


def build_cache(
    teacher: DualEncoder,
    source: Source,
    folder: Path,
    *,
    views: int | None = None,
    augmentation: Augmentation | None = None,
    max_bad: MaxBad = DEFAULT_MAX_BAD,
) -> TeacherCache:
    """Compute the embeddings that `folder` lacks, and return those of the source.

    The folder holds `image.rows` and `text.rows` (`RowFile`), where a picture's embeddings lie
    under its content and a caption's under its SHA-256. So a new, changed or mended picture
    computes itself alone, and a run that was killed loses the batch in hand.

    Args:
        views, augmentation: None takes those of an existing cache; for a new cache, one view and
            `Augmentation()`.
        max_bad: how many pictures may be unreadable; they are skipped and named.

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
    )
    image_file, text_file = folder / "image.rows", folder / "text.rows"
    image_row, text_row = (views, identity.dim), (identity.dim,)
    # The rows say themselves whose they are, for somebody may delete cache.json alone.
    of_texts = {"space": identity.space}
    of_images = {**of_texts, "augmentation": asdict(augmentation)}
    needed = row_bytes(count, image_row, np.float16)
    needed += row_bytes(count * most_captions(source), text_row, np.float16)
    there = sum(path.stat().st_size for path in (image_file, text_file) if path.exists())
    require_space(folder, max(0, needed - there))
    if existing is not None:
        _refuse_other(folder, existing, identity)
    bad: dict[int, str] = {}
    with (
        closing(_open_rows(image_file, image_row, of_images)) as images,
        closing(_open_rows(text_file, text_row, of_texts)) as texts,
        fast_inference(teacher),
        tqdm(total=count * views, desc="teacher cache", unit="img", dynamic_ncols=True) as bar,
    ):
        if existing is None:
            _write_identity(folder, identity)
        try:
            for first in range(0, count, _BATCH):
                chunk = range(first, min(first + _BATCH, count))
                bad |= _add_pictures(images, teacher, source, chunk, identity)
                if source.has_captions:
                    captions_of(source, chunk)  # refuses a picture without any
                    own = [source.captions(index) for index in chunk if index not in bad]
                    _add_captions(texts, teacher, [caption for given in own for caption in given])
                bar.update(len(chunk) * views)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; {len(images)} pictures are kept in {folder}, so run it again to go on"
            ) from None
    report_bad(list(bad.values()), count, max_bad)
    source = without(source, bad)
    numbers = range(len(source))
    text = None
    most = most_captions(source)
    if source.has_captions:
        text = np.zeros((len(source), most, identity.dim), np.float16)
        for number in numbers:
            keys = [_caption_key(caption) for caption in source.captions(number)]
            text[number, : len(keys)] = texts.rows(keys)
    return TeacherCache(
        CacheSettings(
            **{field.name: getattr(identity, field.name) for field in fields(identity)},
            source=source.identity,
            count=len(source),
            captions=source.has_captions,
            texts=most,
        ),
        images.rows([bytes.fromhex(source.content(number)) for number in numbers]),
        text,
        tuple(bad),
    )


def _add_pictures(
    file: RowFile, teacher: DualEncoder, source: Source, chunk: range, identity: CacheIdentity
) -> dict[int, str]:
    """Embed the pictures that `file` lacks; return why others cannot be read, by their index."""
    pictures: dict[bytes, tuple[int, Image.Image]] = {}
    bad: dict[int, str] = {}
    for index in chunk:
        try:
            key = bytes.fromhex(source.content(index))
            if key not in file and key not in pictures:
                pictures[key] = (index, source[index].image)
        except InputError as error:
            bad[index] = str(error)
    if not pictures:
        return bad
    found = np.empty((len(pictures), identity.views, identity.dim), np.float16)
    for view in range(identity.views):
        seen = [
            augment(image, identity.augmentation, picture_seed=seed_of(source, index), view=view)
            for index, image in pictures.values()
        ]
        found[:, view] = _half(teacher.embed_image(teacher.preprocess(seen)))
    file.append(tuple(pictures), found)
    return bad


def _add_captions(file: RowFile, teacher: DualEncoder, captions: Sequence[str]) -> None:
    """Embed the captions that `file` lacks."""
    keys = {_caption_key(caption): caption for caption in captions}
    lacking = {key: caption for key, caption in keys.items() if key not in file}
    if lacking:
        found = _half(teacher.embed_text(teacher.tokenize(list(lacking.values()))))
        file.append(tuple(lacking), found)


def _caption_key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()


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
        with torch.inference_mode(), autocast("auto", model.device):
            yield
    finally:
        model.train(was_training)


def _half(embeddings: torch.Tensor) -> Float16:
    return embeddings.cpu().numpy().astype(np.float16)


def _write_identity(folder: Path, identity: CacheIdentity) -> None:
    with atomic_file(folder / _SETTINGS) as temporary:
        temporary.write_text(json.dumps(asdict(identity), indent=2) + "\n", encoding="utf-8")


def _refuse_other(folder: Path, existing: CacheIdentity, wanted: CacheIdentity) -> None:
    found, given = asdict(existing), asdict(wanted)
    different = [name for name, value in given.items() if found[name] != value]
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
    if isinstance(data, dict) and "shard_size" in data:
        raise ConfigError(
            f"{folder} is a cache of an earlier version, which did not name pictures by their "
            "content: choose another directory, or delete it"
        )
    return parse(CacheIdentity, data, source=str(path))
