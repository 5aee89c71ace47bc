"""Open what the package `datasets` opens: repositories of the Hugging Face hub, folders, Parquet.

A data set is held as memory-mapped Arrow tables and read at random; its pictures are decoded here,
as all others. `datasets` is under the Apache License 2.0.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from tqdm import tqdm

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.sampling import mix64
from edgeclip.compress.data.shards import KEPT_CONTENTS, ShardSource, judged
from edgeclip.compress.data.sources import KnownContents, Pair, Source, content_of, subset
from edgeclip.compress.data.splits import EmptySplitError, OwnSplits
from edgeclip.runtime.bundle.files import atomic_file, cache_root
from edgeclip.runtime.console import escape_controls
from edgeclip.runtime.errors import (
    ConfigError,
    EdgeClipError,
    InputError,
    MissingExtraError,
    first_line,
)
from edgeclip.runtime.inputs.captions import CAPTION_NAMES, caption_texts, captions_of_entry
from edgeclip.runtime.inputs.images import load_image

_log = logging.getLogger(__name__)

_PARQUET = "parquet:"
_HUB = "hf:"
_NAMED = re.compile(r"(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")
_OPTIONS = ("image", "caption", "stream", "first")
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pil_image")
_CAPTIONS = (*CAPTION_NAMES, "txt", "alt_text", "alttext", "prompt", "json")
_SPOOLED = 1000  # samples of a spooled shard
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A value of `--data` that names a data set.

    Attributes:
        name: a repository of the hub, a local folder, or a pattern of Parquet files.
        is_parquet: whether it is the latter.
        config: the configuration (also called subset) of a repository.
        revision: the branch, tag or commit of a repository.
        split: the one split that is used.
        image: the column of the pictures; None to find it.
        caption: the column of the captions; None to find it.
        stream: read the data set once from its source, and keep no more than its pairs.
        first: how many pairs of a stream are taken; None for all.
    """

    name: str
    is_parquet: bool = False
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    image: str | None = None
    caption: str | None = None
    stream: bool = False
    first: int | None = None

    @classmethod
    def parse(cls, data: str) -> "DatasetName":
        """Read `hf:REPO[/CONFIG][@REVISION][:SPLIT][?OPTIONS]` or `parquet:FILES[?OPTIONS]`.

        The options are `image=COLUMN`, `caption=COLUMN`, `stream` and `first=N`, with `&` between.

        Raises:
            ConfigError: an unknown option, or a name that cannot be read.
        """
        body, _, query = data.partition("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        unknown = sorted(given.keys() - set(_OPTIONS))
        if unknown:
            raise ConfigError(
                f"{data}: unknown option {unknown[0]}; there are {', '.join(_OPTIONS)}"
            )
        first = given.get("first")
        if first is not None and (not first.isdecimal() or not int(first)):
            raise ConfigError(f"{data}: first={first} is no number above 0")
        if first is not None and "stream" not in given:
            raise ConfigError(f"{data}: first=N belongs to a stream: write ?stream&first={first}")
        options: dict[str, Any] = {
            "image": given.get("image"),
            "caption": given.get("caption"),
            "stream": "stream" in given,
            "first": None if first is None else int(first),
        }
        if body.startswith(_PARQUET):
            return cls(body.removeprefix(_PARQUET), is_parquet=True, **options)
        body = body.removeprefix(_HUB)
        if Path(body).exists():
            return cls(body, **options)
        match = _NAMED.fullmatch(body)
        if match is None:
            raise ConfigError(f"{data}: write hf:REPO, hf:REPO/CONFIG@REVISION:SPLIT or hf:FOLDER")
        name, split = match["name"], match["split"]
        config = None
        if not Path(name).exists() and name.count("/") == 2:
            name, _, config = name.rpartition("/")
        return cls(name, config=config, revision=match["revision"], split=split, **options)

    def files(self) -> list[str]:
        """Return the Parquet files.

        Raises:
            InputError: there are none.
        """
        pattern = f"{self.name}/**/*.parquet" if Path(self.name).is_dir() else self.name
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{self.name} matches no .parquet file: check the path")
        return found


def open_dataset(data: str, *, split: Split, size: int) -> Source:
    """Open a data set; of a split that is not trained on, at most `MOST_JUDGED` pictures.

    A data set that has a split to train on and one to test or validate on is divided by these; one
    with only one of the latter has it halved, for calibration and for test. Any other, or the one
    split that is named, is divided by a hash of each pair's number.

    Args:
        data: see `DatasetName.parse`. A stream is read once and kept as shards.
        split: the split to open.
        size: the shortest side that will be needed, in pixels.

    Raises:
        MissingExtraError: the package is not installed.
        InputError: it cannot be opened, or has no column of pictures.
        ConfigError: no pair is of the split, or a name that cannot be read.
    """
    named = DatasetName.parse(data)
    if named.stream:
        spooled = ShardSource(_spool(named, data), split=split, min_side=size, name=data)
        return spooled if split == "train" else judged(spooled)
    parts = _load(named, data)
    own = OwnSplits(parts)
    tables = [parts[name] for name in own.names_of(split)]
    source: Source = HubSource(tables, named, split=split, min_side=size, name=data)
    low, high = own.bounds(split)
    if (low, high) != (0.0, 1.0):
        shares = mix64(np.arange(len(source), dtype=np.uint64)) / 2.0**64
        rows = np.flatnonzero((low <= shares) & (shares < high))
        if not len(rows):
            raise EmptySplitError(
                f"none of the {len(source)} pairs of {data} falls to {split}: give more"
            )
        source = subset(source, rows, name=f"{source.name}, {len(rows)} of them for {split}")
    return source if split == "train" else judged(source)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"data sets of the hub and Parquet files need the package {error.name!r}: "
            "pip install 'edgeclip[data]'"
        ) from error
    return datasets


def _load(named: DatasetName, data: str) -> dict[str, Any]:
    """Return the tables of a data set by the names of its splits."""
    datasets = _datasets()
    folder = Path(named.name)
    try:
        if named.is_parquet:
            # One split, whatever the names of the files say.
            files = {"train": named.files()}
            found = datasets.load_dataset("parquet", data_files=files, split="train")
        elif any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(named.name)
        else:
            found = datasets.load_dataset(
                named.name, named.config, revision=named.revision, split=named.split
            )
    except EdgeClipError:
        raise
    except Exception as error:  # of many kinds
        raise _unopened(data, error) from error
    if isinstance(found, datasets.DatasetDict):
        return dict(found)
    return {named.split or "all": found}


def _unopened(data: str, error: Exception) -> InputError:
    return InputError(
        f"{data} cannot be opened by the package datasets: {first_line(error)}; check the name, "
        "and that the hub can be reached and lets you in (hf auth login)"
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    """The names of the columns that are read."""

    image: str
    captions: tuple[str, ...]

    @classmethod
    def of(cls, features: Mapping[str, Any], named: DatasetName, data: str) -> "_Columns":
        """Choose the columns by the options, or by their names and kinds.

        Raises:
            ConfigError: an option names no column.
            InputError: there is no column of pictures.
        """
        for wanted in (named.image, named.caption):
            if wanted is not None and wanted not in features:
                raise ConfigError(
                    f"{data} has no column {wanted}: its columns are {', '.join(features)}"
                )
        image = named.image or _image_column(features)
        if image is None:
            raise InputError(
                f"{data} has no column of pictures that can be known as such: its columns are "
                f"{', '.join(features)}; name it by ?image=COLUMN (addresses are no pictures)"
            )
        if named.caption is not None:
            return cls(image, (named.caption,))
        for wanted in _CAPTIONS:
            pattern = re.compile(rf"{wanted}_?\d*", re.IGNORECASE)
            found = tuple(name for name in features if pattern.fullmatch(name) and name != image)
            if found:
                return cls(image, found)
        return cls(image, ())


def _image_column(features: Mapping[str, Any]) -> str | None:
    declared = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if declared:
        return declared[0]
    holding = [
        name
        for name, kind in features.items()
        if getattr(kind, "dtype", None) in ("binary", "large_binary")
        or (isinstance(kind, Mapping) and "bytes" in kind)
    ]
    named = [name for name in holding if name.casefold() in _IMAGES]
    return next(iter(named or holding), None)


class HubSource:
    """The pairs of some tables of the package `datasets`, one behind the other.

    Args:
        tables: of equal columns, at least one row in all.
        named: what they were opened by.
        split: the split of the pairs; None if it is unknown.
        min_side: the shortest side that will be needed, in pixels; see `load_image`.
        name: the name for messages.

    Raises:
        InputError: there are no rows, or no column of pictures.
        ConfigError: an option names no column.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        named: DatasetName,
        *,
        split: Split | None = None,
        min_side: int | None = None,
        name: str,
    ) -> None:
        datasets = _datasets()
        shown = escape_controls(name)
        if not sum(map(len, tables)):
            raise InputError(f"{shown} holds no pairs")
        table = datasets.concatenate_datasets(list(tables)) if len(tables) > 1 else tables[0]
        columns = _Columns.of(table.features, named, shown)
        if type(table.features[columns.image]).__name__ == "Image":
            table = table.cast_column(columns.image, datasets.Image(decode=False))
        self.split = split
        self.name = f"{shown}, {len(table)} pairs"
        self._shown = shown
        self._min_side = min_side
        self._image, self._columns = columns.image, columns.captions
        self._pictures = table.select_columns([columns.image])
        self._texts = table.select_columns(list(columns.captions)) if columns.captions else None
        # Of the files, the options and all that was done with them.
        self.identity = f"datasets:{min_side}:{columns}:{table._fingerprint}"
        self._contents = KnownContents(len(self), most=KEPT_CONTENTS)
        self._last: tuple[int, bytes] = (-1, b"")  # a picture's content and pixels need one read

    @functools.cached_property
    def has_captions(self) -> bool:
        return any(self.captions(index) for index in range(len(self)))

    @functools.cached_property
    def most_captions(self) -> int:
        """The most captions of a picture."""
        if self._texts is None:
            return 0
        return sum(_longest(self._texts.data.column(name)) for name in self._columns)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Pair:
        data = self._read(index)
        try:
            return Pair(load_image(data, min_side=self._min_side), self.caption(index))
        except InputError as error:
            raise InputError(f"{self._shown}, row {index}: {error}") from error

    def caption(self, index: int) -> str | None:
        return next(iter(self.captions(index)), None)

    def captions(self, index: int) -> tuple[str, ...]:
        if self._texts is None:
            return ()
        row = self._texts[_checked(index, len(self))]
        return tuple(text for name in self._columns for text in _texts_of(row[name]))

    def content(self, index: int) -> str:
        """Return a hash of the picture's bytes and of how they are decoded."""
        return self._contents.of(
            _checked(index, len(self)),
            lambda: content_of(hashlib.sha256(self._read(index)).digest(), self._min_side),
        )

    def _read(self, index: int) -> bytes:
        last, data = self._last
        if last == index:
            return data
        value = self._pictures[_checked(index, len(self))][self._image]
        try:
            data = _bytes_of(value)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._shown}, row {index}: {error}") from error
        self._last = (index, data)
        return data


def _checked(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise IndexError(index)
    return index


def _bytes_of(value: Any) -> bytes:
    """Return the bytes of a picture that is not decoded: bytes, or {"bytes": ..., "path": ...}.

    Raises:
        OSError: its file cannot be read.
        ValueError: there is none.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return Path(value).read_bytes()
    if not isinstance(value, bytes) or not value:
        raise ValueError("there is no picture")
    return value


def _texts_of(value: Any) -> tuple[str, ...]:
    """Return the captions of a cell: a text, a list of texts or of sentences, or an object."""
    if isinstance(value, Mapping):
        return captions_of_entry(value)
    return caption_texts(value)


def _longest(column: Any) -> int:
    """Return the most entries of a cell."""
    import pyarrow.compute as compute
    from pyarrow import types

    if types.is_list(column.type) or types.is_large_list(column.type):
        return int(compute.max(compute.list_value_length(column)).as_py() or 0)
    return 1


def _spool(named: DatasetName, data: str) -> tuple[Path, ...]:
    """Read a stream once into shards in this user's cache, and return these.

    A shard appears whole or not at all, so that an interrupted stream goes on behind the last one.

    Raises:
        InputError: the stream cannot be opened, or ends in an error.
    """
    key = json.dumps(dataclasses.astuple(named))
    folder = cache_root() / "streams" / hashlib.sha256(key.encode()).hexdigest()[:32]
    done = folder / "complete"
    if not done.exists():
        try:
            _write_stream(named, data, folder)
        except EdgeClipError:
            raise
        except Exception as error:  # of many kinds
            raise _unopened(data, error) from error
        folder.mkdir(parents=True, exist_ok=True)
        done.touch()
    shards = tuple(sorted(folder.glob("*.tar")))
    if not shards:
        raise InputError(f"{data} holds no pairs")
    return shards


def _write_stream(named: DatasetName, data: str, folder: Path) -> None:
    datasets = _datasets()
    if named.is_parquet:
        stream = datasets.load_dataset(
            "parquet", data_files={"train": named.files()}, split="train", streaming=True
        )
    else:
        stream = datasets.load_dataset(
            named.name,
            named.config,
            revision=named.revision,
            split=named.split or "train",
            streaming=True,
        )
    features = stream.features or stream._resolve_features().features
    columns = _Columns.of(features, named, data)
    if type(features[columns.image]).__name__ == "Image":
        stream = stream.cast_column(columns.image, datasets.Image(decode=False))
    written = max((int(path.stem.split("-")[1]) for path in folder.glob("*.tar")), default=0)
    _log.info("reading %s into %s; %d pairs are there", data, folder, written)
    rows = islice(stream.skip(written), None if named.first is None else named.first - written)
    with tqdm(
        total=named.first, initial=written, desc="stream", unit="img", dynamic_ncols=True
    ) as bar:
        while chunk := list(islice(rows, _SPOOLED)):
            last = written + len(chunk)
            target = folder / f"{written:012d}-{last:012d}.tar"
            with atomic_file(target) as temporary, tarfile.open(temporary, "w") as archive:
                for number, row in enumerate(chunk, written):
                    _add_sample(archive, f"{number:012d}", row, columns)
            written = last
            bar.update(len(chunk))


def _add_sample(
    archive: tarfile.TarFile, key: str, row: Mapping[str, Any], columns: _Columns
) -> None:
    with contextlib.suppress(OSError, ValueError):  # counted as a sample without a picture
        picture = _bytes_of(row[columns.image])
        _add_member(archive, f"{key}.{_suffix(picture)}", picture)
    captions = [text for name in columns.captions for text in _texts_of(row[name])]
    described = json.dumps({"captions": captions}, ensure_ascii=False)
    _add_member(archive, f"{key}.json", described.encode("utf-8", "surrogatepass"))


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _suffix(picture: bytes) -> str:
    """Return a suffix by what the file begins with; it is read by its content, so any will do."""
    return next((name for head, name in _SUFFIXES.items() if picture.startswith(head)), "jpg")
