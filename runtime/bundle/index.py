"""Embeddings with names: an index, its exact search, label sets, and their checks."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import FloatArray, Values
from edgeclip.runtime.bundle.files import read_npz, write_npz
from edgeclip.runtime.errors import InputError, SpaceMismatchError
from edgeclip.runtime.spec import as_text_list

# Rounding to fp16 changes a unit vector's length by less than this.
_UNIT_TOLERANCE = 5e-3
_INDEX_KIND = "edgeclip-index-1"
_LABELS_KIND = "edgeclip-labels-1"
_NO_EMBEDDER = {"embedder": ""}  # of files that were written before it was kept
_SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32


@dataclass(frozen=True, slots=True)
class Hit:
    """A search hit: a key of the index and its cosine with the query."""

    key: str
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """Keys, such as file paths or texts, with one embedding each; a key may occur again.

    `embeddings` is float32 [N, dim], L2-normalised, made in the embedding space whose
    fingerprint is `space`, by the tower that `embedder` names (see `embedder_of`; "" if unknown).
    """

    keys: tuple[str, ...]
    embeddings: FloatArray
    space: str
    embedder: str = ""

    def __post_init__(self) -> None:
        """Check keys and embeddings.

        Raises:
            InputError: empty keys, or embeddings that do not fit them.
        """
        check_keyed("index", self.keys, self.embeddings, self.space, unique=False)

    def search(
        self, queries: NDArray[Any], top: int = 10, *, space: str | None = None
    ) -> tuple[tuple[Hit, ...], ...]:
        """Find the `top` keys of highest cosine for each query, best first.

        The search is exact. Equal scores keep the order of the index; an index smaller than
        `top` returns all keys. Queries are processed in chunks to bound memory.

        Args:
            queries: floats [Q, dim], L2-normalised.
            top: how many hits to return, at least 1.
            space: fingerprint of the queries' embedding space, if it is known.

        Raises:
            SpaceMismatchError: `space` is not the index's.
            InputError: another shape, NaN, rows not L2-normalised, or `top` below 1.
        """
        if space is not None:
            self.check_space(space)
        check_unit_rows(queries, "queries")
        if queries.shape[1] != self.embeddings.shape[1]:
            raise InputError(
                f"queries have {queries.shape[1]} dimensions, the index has "
                f"{self.embeddings.shape[1]}: use the encoder that made the index"
            )
        if top < 1:
            raise InputError(f"top is {top}: ask for at least 1 hit")
        return tuple(
            tuple(Hit(self.keys[row], float(scores[row])) for row in best_rows(scores, top))
            for scores in self._scores(queries.astype(np.float32, copy=False))
        )

    def _scores(self, queries: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """Yield the scores [N] of each query."""
        chunk = max(1, _SCORES_AT_ONCE // len(self.keys))
        for start in range(0, len(queries), chunk):
            yield from queries[start : start + chunk] @ self.embeddings.T

    def save(self, path: Path) -> None:
        """Write the index to an npz file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        meta = {"keys": self.keys, "space": self.space, "embedder": self.embedder}
        write_npz(path, _INDEX_KIND, meta, {"embeddings": self.embeddings})

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read an index from an npz file.

        Raises:
            InputError: missing or damaged file, or not an index.
        """
        keys = frozenset({"keys", "space", "embedder"})
        meta, arrays = read_npz(
            path, _INDEX_KIND, keys, frozenset({"embeddings"}), defaults=_NO_EMBEDDER
        )
        try:
            return cls(
                text_tuple(meta["keys"]), arrays["embeddings"], meta["space"], _text(meta, path)
            )
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from error

    def check_space(self, space: str) -> None:
        """Check that the index belongs to an encoder's embedding space.

        Raises:
            SpaceMismatchError: the fingerprints differ.
        """
        check_space(space, self.space, "the index")


def embedder_of(model: str) -> str:
    """Return the digest that names what embeds: SHA-256 of `Encoder.model_of`, 64 hex digits."""
    return hashlib.sha256(model.encode()).hexdigest()


def _text(meta: dict[str, Any], path: Path) -> str:
    embedder = meta["embedder"]
    if not isinstance(embedder, str):
        raise InputError(f"the embedder in {path} is no text")
    return embedder


def best_rows(scores: NDArray[np.float32], top: int) -> NDArray[np.intp]:
    """Return the rows of the `top` highest scores, best first, ties in row order."""
    count = min(top, len(scores))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= threshold)
    order = np.argsort(-scores[candidates], kind="stable")[:count]
    best: NDArray[np.intp] = candidates[order]
    return best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelSet:
    """Class names with one text embedding each.

    `embeddings` is float32 [K, dim], L2-normalised, made in the embedding space whose
    fingerprint is `space`, from `templates` such as "a photo of a {}", by the tower that `embedder`
    names (see `embedder_of`; "" if unknown).
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]
    space: str
    templates: tuple[str, ...] = ()
    embedder: str = ""

    def __post_init__(self) -> None:
        """Check names and embeddings.

        Raises:
            InputError: repeated or empty names, or embeddings that do not fit them.
        """
        check_keyed("label", self.names, self.embeddings, self.space)

    @property
    def digest(self) -> str:
        """SHA-256 of names and embeddings, 64 hexadecimal digits."""
        found = hashlib.sha256("\0".join(self.names).encode())
        found.update(np.ascontiguousarray(self.embeddings, dtype="<f4").tobytes())
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Write the label set to an npz file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        meta = {
            "names": self.names,
            "templates": self.templates,
            "space": self.space,
            "embedder": self.embedder,
        }
        write_npz(path, _LABELS_KIND, meta, {"embeddings": self.embeddings})

    @classmethod
    def load(cls, path: Path) -> "LabelSet":
        """Read a label set from an npz file.

        Raises:
            InputError: missing or damaged file, or not a label set.
        """
        keys = frozenset({"names", "templates", "space", "embedder"})
        meta, arrays = read_npz(
            path, _LABELS_KIND, keys, frozenset({"embeddings"}), defaults=_NO_EMBEDDER
        )
        try:
            return cls(
                names=text_tuple(meta["names"]),
                embeddings=arrays["embeddings"],
                space=meta["space"],
                templates=text_tuple(meta["templates"]),
                embedder=_text(meta, path),
            )
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from error

    def check_space(self, space: str) -> None:
        """Check that the label set belongs to an encoder's embedding space.

        Raises:
            SpaceMismatchError: the fingerprints differ.
        """
        check_space(space, self.space, "the label set")


def bake_labels(
    names: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[list[str]], NDArray[np.float32]],
    space: str,
    embedder: Callable[[], str] = str,
) -> LabelSet:
    """Embed label names: each label's embedding is the normalised mean over all templates.

    Source: CLIP's prompt ensembles (Radford et al. 2021, section 3.1.4).

    Args:
        names: the labels.
        templates: sentences, each with one `{}` for the name.
        encode: the text tower, texts -> float32 [N, dim], L2-normalised.
        space: fingerprint of its embedding space.
        embedder: gives the name of what embedded, see `embedder_of`.

    Raises:
        InputError: no names, a repeated name, one that is not a str, or a template without
            exactly one `{}`.
    """
    names = () if isinstance(names, str) else as_text_list(names, "labels")
    templates = as_text_list(templates, "templates")
    if not names or not templates:
        raise InputError("labels must be a list of at least one name, with at least one template")
    other = [item for item in (*names, *templates) if not isinstance(item, str)]
    if other:
        raise InputError(f"label or template {other[0]!r} is {type(other[0]).__name__}, not str")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise InputError(f"template {wrong[0]!r} must contain {{}} exactly once, for the name")
    texts = [template.replace("{}", name) for name in names for template in templates]
    mean = encode(texts).reshape(len(names), len(templates), -1).mean(axis=1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    return LabelSet(
        names=tuple(names),
        embeddings=mean,
        space=space,
        templates=tuple(templates),
        embedder=embedder(),
    )


def cosines(ours: NDArray[Any], reference: NDArray[Any]) -> Values:
    """Return the cosine of each row with the reference's: float64 [N].

    Raises:
        InputError: shapes that differ, NaN or infinity, or an embedding of length 0.
    """
    first, second = paired_unit_rows(ours, reference)
    result: Values = np.einsum("nd,nd->n", first, second)
    return np.clip(result, -1.0, 1.0)


def paired_unit_rows(first: NDArray[Any], second: NDArray[Any]) -> tuple[Values, Values]:
    """Normalise two matrices whose rows form pairs; float64 [N, dim] each.

    Raises:
        InputError: shapes that differ, NaN or infinity, or an embedding of length 0.
    """
    if np.shape(first) != np.shape(second):
        raise InputError(
            f"paired embeddings have shapes {np.shape(first)} and {np.shape(second)}: "
            "row i of both must be one pair"
        )
    return unit_rows(first, "the first embeddings"), unit_rows(second, "the second embeddings")


def unit_rows(array: NDArray[Any], what: str) -> Values:
    """L2-normalise embeddings in float64, [N, dim]; `what` names them in error messages.

    Raises:
        InputError: as `check_matrix`, or an embedding of length 0.
    """
    check_matrix(array, what)
    wide = array.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"{what} include a row of length 0, which has no direction")
    unit: Values = wide / lengths
    return unit


def check_matrix(array: object, what: str) -> None:
    """Refuse anything but a finite floating-point matrix [rows >= 1, dim >= 1].

    Args:
        array: the embeddings.
        what: their name in the error message.

    Raises:
        InputError: not an array, not floats, another shape, empty, NaN or infinity.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"{what} must be a numpy array of floats, not {kind}")
    if array.ndim == 1:
        raise InputError(f"{what} must have shape [N, dim], not {array.shape}: use array[None]")
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"{what} must have shape [N, dim] with at least one row, not {array.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(
            f"NaN or infinity in {bad.size} of {len(array)} rows of {what}, "
            f"first in row {bad[0]}: look for what put it there"
        )


def check_unit_rows(array: NDArray[Any], what: str) -> None:
    """Refuse anything but a finite matrix whose rows have length 1.

    Raises:
        InputError: as `check_matrix`, or a row that is not L2-normalised.
    """
    check_matrix(array, what)
    lengths = np.linalg.norm(array.astype(np.float32, copy=False), axis=1)
    off = np.flatnonzero(np.abs(lengths - 1) > _UNIT_TOLERANCE)
    if off.size:
        raise InputError(
            f"{what} must be L2-normalised, but row {off[0]} has length "
            f"{lengths[off[0]]:.4g}: divide each row by its length"
        )


def check_embeddings(array: object, dim: int, what: str) -> None:
    """Refuse anything but float32 [N, dim] with rows of length 1; N may be 0.

    Raises:
        InputError: as `check_unit_rows`, or another shape or dtype.
    """
    wanted = f"{what} must be a float32 array [N, {dim}] of embeddings"
    if not isinstance(array, np.ndarray):
        raise InputError(f"{wanted}, not {type(array).__name__}")
    if array.ndim != 2 or array.shape[1] != dim or array.dtype != np.float32:
        raise InputError(f"{wanted}, not {array.dtype} {list(array.shape)}")
    if len(array):
        check_unit_rows(array, what)


def check_space(expected: str, found: str, what: str) -> None:
    """Refuse to compare embeddings of two embedding spaces.

    Args:
        expected: fingerprint of the encoder's embedding space.
        found: fingerprint that `what` carries.
        what: its name in the error message, such as "the index photos.npz".

    Raises:
        SpaceMismatchError: the fingerprints differ.
    """
    if expected != found:
        raise SpaceMismatchError(
            f"{what} was made in the embedding space {found[:12]}, not in {expected[:12]}: "
            "create it again with an encoder of this space"
        )


def check_keyed(
    what: str,
    keys: Sequence[object],
    embeddings: NDArray[Any],
    space: object,
    *,
    unique: bool = True,
) -> None:
    """Check that each row of unit float32 embeddings has a name, and if asked for a unique one.

    Raises:
        InputError: repeated, empty or too few keys, or embeddings that are not float32
            [len(keys), dim] with rows of length 1, or no space.
    """
    check_unit_rows(embeddings, f"{what} embeddings")
    if embeddings.dtype != np.float32:
        raise InputError(f"{what} embeddings must be float32, not {embeddings.dtype}")
    if len(keys) != len(embeddings):
        raise InputError(f"{len(keys)} {what} names cannot name {len(embeddings)} embeddings")
    check_keys(what, keys, space, unique=unique)


def check_keys(what: str, keys: Sequence[object], space: object, *, unique: bool = True) -> None:
    """Check the names of embeddings, and the fingerprint of their space.

    Raises:
        InputError: repeated or empty keys, or no space.
    """
    if not all(isinstance(key, str) and key for key in keys):
        raise InputError(f"every {what} name must be a non-empty text")
    if unique and len(set(keys)) != len(keys):
        first = Counter(keys).most_common(1)[0][0]
        raise InputError(f"the {what} name {first!r} occurs twice: make the names unique")
    if not isinstance(space, str) or not space:
        raise InputError(f"{what} embeddings need the fingerprint of their embedding space")


def text_tuple(value: object) -> tuple[str, ...]:
    """Check that JSON data is a list of texts, and return it as a tuple.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError("a list of texts was expected")
    return tuple(value)


def limit_blas_to_one_thread() -> None:
    """Limit the BLAS of this process to one thread per matrix product, from now on.

    By default BLAS splits a product over some thousand rows between all processors, and its
    threads wait by spinning. Where several threads of a server do that at once, hundreds of
    milliseconds of CPU time go into a product that takes a tenth of a millisecond alone.
    """
    from threadpoolctl import threadpool_limits  # which searching on a device does not need

    threadpool_limits(limits=1, user_api="blas")
