"""Make and update an index step by step, so that nothing that was embedded is lost."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.bundle.index import Index, embedder_of
from edgeclip.runtime.bundle.reduced_index import AnyIndex, ReducedIndex, load_index
from edgeclip.runtime.bundle.reduction import Reducer
from edgeclip.runtime.bundle.rows import RowFile, row_bytes
from edgeclip.runtime.errors import InputError, SpaceMismatchError

_DIGEST = 8  # bytes of the hash that tells an embedding from all others of an index


@dataclass(frozen=True, slots=True)
class IndexChange:
    """The keys of an index that an update added, changed, removed and left as they were."""

    index: AnyIndex
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    kept: int


class IndexUpdate:
    """An index while it is made or updated; `close` it in any case.

    Beside the index `NAME.npz` lie two files of rows by the content's hash (`RowFile`):
    `NAME.npz.part` with the embeddings of an unfinished run, and `NAME.npz.contents` with the
    first 8 bytes of the SHA-256 of the embedding that each content has in the index. The index
    itself stays one plain file; without its `.contents` everything is embedded again.

    Args:
        out: the index.
        space: fingerprint of the embedding space.
        model: names what embeds: bundle, tower and precision.
        dim: length of an embedding.
        reducer: makes the rows of an index of reduced embeddings; None for full ones.
        replace: forget the index that exists, and an unfinished run of another model.

    Raises:
        SpaceMismatchError: the index belongs to another embedding space.
        InputError: the index is of another form of embeddings; or it, or an unfinished run, was
            made by another model, or is damaged.
    """

    def __init__(
        self,
        out: Path,
        *,
        space: str,
        model: str,
        dim: int,
        replace: bool,
        reducer: Reducer | None = None,
    ) -> None:
        self._out, self._reducer = out, reducer
        self._space, self._embedder = space, embedder_of(model)
        settings = {"space": space, "model": model}
        settings |= {} if reducer is None else {"basis": reducer.digest}
        self._row_shape, self._row_type = _row(dim, reducer)
        part = out.with_name(out.name + ".part")
        self._contents_path = out.with_name(out.name + ".contents")
        self._old = None if replace or not out.exists() else _load_index(out, space, reducer)
        part_settings: dict[str, Any] = {
            "shape": self._row_shape,
            "dtype": self._row_type,
            "settings": settings,
            "mend": "it is an unfinished run, so finish that with its bundle and --precision, or "
            "begin anew with --replace",
        }
        try:
            self._part = RowFile(part, **part_settings)
        except InputError:
            if not replace:
                raise
            part.unlink()
            self._part = RowFile(part, **part_settings)
        self._digest_settings: dict[str, Any] = {
            "shape": (_DIGEST,),
            "dtype": np.uint8,
            "settings": settings,
            "mend": f"{out} was embedded by another bundle, tower or --precision, so use that, "
            "or begin anew with --replace",
        }
        self._known: dict[bytes, int] = {}  # content -> row of the old index
        if self._old is not None:
            rows = {_digest(row): number for number, row in enumerate(_rows_of(self._old))}
            digests = RowFile(self._contents_path, **self._digest_settings)
            for content in digests.keys:
                row = rows.get(digests.rows([content])[0].tobytes())
                if row is not None:
                    self._known[content] = row

    def __contains__(self, content: bytes) -> bool:
        """Whether the embedding of a content (SHA-256) is known."""
        return content in self._part or content in self._known

    def __len__(self) -> int:
        """Return how many embeddings the unfinished run holds."""
        return len(self._part)

    def add(self, contents: Sequence[bytes], embeddings: FloatArray) -> None:
        """Keep the embeddings of some contents, float32 [N, dim]; a kill loses none of them.

        Raises:
            InputError: the file cannot be written, or nothing is left of a reduced embedding.
        """
        rows = embeddings if self._reducer is None else self._reducer.rows(embeddings)
        self._part.append(contents, rows)

    def finish(
        self, keys: Sequence[str], contents: Sequence[bytes], *, is_named: Callable[[str], bool]
    ) -> IndexChange:
        """Write the index: `keys` in their order, after those of before that are not named now.

        Args:
            keys: all keys of this run; one may occur again.
            contents: the content of each, whose embedding is known.
            is_named: whether a key of before would be in `keys` if it still existed; such keys are
                removed.

        Raises:
            InputError: the index cannot be written.
        """
        rows = self._rows(contents)
        new = frozenset(keys)
        old_keys = () if self._old is None else self._old.keys
        before = {key: number for number, key in enumerate(old_keys)}
        gone = [key for key in before if key not in new]
        others = [n for n, key in enumerate(old_keys) if key not in new and not is_named(key)]
        every = rows
        if self._old is not None and others:
            every = np.concatenate([_rows_of(self._old)[others], rows])
        of_others = self._old.embedder if self._old is not None and others else self._embedder
        all_keys = (*(old_keys[n] for n in others), *keys)
        embedder = self._embedder if of_others == self._embedder else ""
        index: AnyIndex
        if self._reducer is None:
            index = Index(all_keys, every, self._space, embedder)
        else:
            index = ReducedIndex(all_keys, every, self._reducer, embedder)
        if self._old is None:  # or a kill would leave contents that are not of this index's model
            self._contents_path.unlink(missing_ok=True)
        index.save(self._out)
        self._write_contents(contents, rows, index)
        self._part.close()
        self._part.path.unlink(missing_ok=True)
        changed = tuple(
            key
            for key, row in zip(keys, rows, strict=True)
            if self._old is not None
            and key in before
            and not np.array_equal(_rows_of(self._old)[before[key]], row)
        )
        return IndexChange(
            index=index,
            added=tuple(key for key in keys if key not in before),
            changed=changed,
            removed=tuple(key for key in gone if is_named(key)),
            kept=len(others) + sum(key in before for key in keys) - len(changed),
        )

    def _rows(self, contents: Sequence[bytes]) -> NDArray[Any]:
        rows = np.empty((len(contents), *self._row_shape), self._row_type)
        for number, content in enumerate(contents):
            if content in self._part:
                rows[number] = self._part.rows([content])[0]
            else:
                assert self._old is not None
                rows[number] = _rows_of(self._old)[self._known[content]]
        return rows

    def _write_contents(
        self, contents: Sequence[bytes], rows: NDArray[Any], index: AnyIndex
    ) -> None:
        """Write which content each row of the index has, as far as that is known."""
        found = {content: _digest(row) for content, row in zip(contents, rows, strict=True)}
        if self._old is not None:
            still = {_digest(row) for row in _rows_of(index)}
            for content, row in self._known.items():
                digest = _digest(_rows_of(self._old)[row])
                if digest in still:
                    found.setdefault(content, digest)
        digests = np.frombuffer(b"".join(found.values()), np.uint8).reshape(-1, _DIGEST)
        with (
            atomic_file(self._contents_path) as temporary,
            closing(RowFile(temporary, **self._digest_settings)) as file,
        ):
            file.append(tuple(found), digests)

    def close(self) -> None:
        """Flush the unfinished run to the disk, and close its file."""
        self._part.close()


def index_bytes(count: int, dim: int, reducer: Reducer | None = None) -> int:
    """Return how many bytes an index and the files beside it take while it is made."""
    row = row_bytes(count, *_row(dim, reducer))
    return 2 * row + row_bytes(count, (_DIGEST,), np.uint8)


def _row(dim: int, reducer: Reducer | None) -> tuple[tuple[int, ...], DTypeLike]:
    return ((dim,), np.float32) if reducer is None else reducer.form.row


def _rows_of(index: AnyIndex) -> NDArray[Any]:
    return index.embeddings if isinstance(index, Index) else index.rows


def _load_index(out: Path, space: str, reducer: Reducer | None) -> AnyIndex:
    index = load_index(out)
    if index.space != space:
        raise SpaceMismatchError(
            f"the index {out} was made in the embedding space {index.space[:12]}, not in "
            f"{space[:12]}: choose another --out, or begin anew with --replace"
        )
    found = None if isinstance(index, Index) else index.reducer
    if (found and found.digest) != (reducer and reducer.digest):
        has = "full embeddings" if found is None else f"embeddings reduced to {found.form}"
        raise InputError(
            f"the index {out} holds {has}, by other axes or of another form than is asked for: "
            "choose another --out, or begin anew with --replace"
        )
    return index


def _digest(row: NDArray[Any]) -> bytes:
    return hashlib.sha256(row.tobytes()).digest()[:_DIGEST]
