"""Make an index in steps that a kill does not undo, and update one that exists."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.bundle.row_file import RowFile, row_bytes
from edgeclip.runtime.errors import SpaceMismatchError

_DIGEST = 8  # bytes of the hash that tells an embedding from all others of an index


@dataclass(frozen=True, slots=True)
class IndexChange:
    """The keys of an index that an update added, changed, removed and left as they were."""

    index: Index
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    kept: int


class IndexUpdate:
    """An index while it is made or updated; use it as a context manager.

    Beside the index `NAME.npz` lie two files of rows by the content's hash (`RowFile`):
    `NAME.npz.part` with the embeddings of an unfinished run, and `NAME.npz.contents` with the
    first 8 bytes of the SHA-256 of the embedding that each content has in the index. The index
    itself stays one plain file; without its `.contents` everything is embedded again.

    Args:
        out: the index.
        space: fingerprint of the embedding space.
        model: names what embeds: bundle, tower and precision.
        dim: length of an embedding.
        replace: forget the index that exists.

    Raises:
        SpaceMismatchError: the index belongs to another embedding space.
        InputError: the index, or an unfinished run, was made by another model, or is damaged.
    """

    def __init__(self, out: Path, *, space: str, model: str, dim: int, replace: bool) -> None:
        self._out = out
        self._space = space
        settings = {"space": space, "model": model}
        part = out.with_name(out.name + ".part")
        self._contents_path = out.with_name(out.name + ".contents")
        if replace:
            part.unlink(missing_ok=True)
        self._old = None if replace or not out.exists() else _load(out, space)
        self._part = RowFile(
            part,
            shape=(dim,),
            dtype=np.float32,
            settings=settings,
            mend="it is an unfinished run, so finish that with its bundle and --precision, or "
            "begin anew with --replace",
        )
        self._digest_settings: dict[str, Any] = {
            "shape": (_DIGEST,),
            "dtype": np.uint8,
            "settings": settings,
            "mend": f"{out} was embedded by another bundle, tower or --precision, so use that, "
            "or begin anew with --replace",
        }
        self._known: dict[bytes, int] = {}  # content -> row of the old index
        if self._old is not None:
            rows = {_digest(row): number for number, row in enumerate(self._old.embeddings)}
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
            InputError: the file cannot be written.
        """
        self._part.append(contents, embeddings)

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
        embeddings = rows
        if self._old is not None and others:
            embeddings = np.concatenate([self._old.embeddings[others], rows])
        index = Index((*(old_keys[n] for n in others), *keys), embeddings, self._space)
        index.save(self._out)
        self._write_contents(contents, rows, index)
        self._part.close()
        self._part.path.unlink(missing_ok=True)
        changed = tuple(
            key
            for key, row in zip(keys, rows, strict=True)
            if self._old is not None
            and key in before
            and not np.array_equal(self._old.embeddings[before[key]], row)
        )
        return IndexChange(
            index=index,
            added=tuple(key for key in keys if key not in before),
            changed=changed,
            removed=tuple(key for key in gone if is_named(key)),
            kept=len(others) + sum(key in before for key in keys) - len(changed),
        )

    def _rows(self, contents: Sequence[bytes]) -> FloatArray:
        rows = np.empty((len(contents), self._dim()), np.float32)
        for number, content in enumerate(contents):
            if content in self._part:
                rows[number] = self._part.rows([content])[0]
            else:
                assert self._old is not None
                rows[number] = self._old.embeddings[self._known[content]]
        return rows

    def _dim(self) -> int:
        return int(self._part.row_shape[0])

    def _write_contents(self, contents: Sequence[bytes], rows: FloatArray, index: Index) -> None:
        """Write which content each row of the index has, as far as that is known."""
        found = {content: _digest(row) for content, row in zip(contents, rows, strict=True)}
        if self._old is not None:
            still = {_digest(row) for row in index.embeddings}
            for content, row in self._known.items():
                digest = _digest(self._old.embeddings[row])
                if digest in still:
                    found.setdefault(content, digest)
        digests = np.frombuffer(b"".join(found.values()), np.uint8).reshape(-1, _DIGEST)
        with (
            atomic_file(self._contents_path) as temporary,
            RowFile(temporary, **self._digest_settings) as file,
        ):
            file.append(tuple(found), digests)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._part.close()


def index_bytes(count: int, dim: int) -> int:
    """Return how many bytes an index and the files beside it take while it is made."""
    row = row_bytes(count, (dim,), np.float32)
    return 2 * row + row_bytes(count, (_DIGEST,), np.uint8)


def _load(out: Path, space: str) -> Index:
    index = Index.load(out)
    if index.space != space:
        raise SpaceMismatchError(
            f"the index {out} was made in the embedding space {index.space[:12]}, not in "
            f"{space[:12]}: choose another --out, or begin anew with --replace"
        )
    return index


def _digest(row: FloatArray) -> bytes:
    return hashlib.sha256(row.tobytes()).digest()[:_DIGEST]
