"""Label sets: class names and their text embeddings, for zero-shot classification."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.files import read_npz, write_npz
from edgeclip.runtime.bundle.index import check_keyed, check_space, text_tuple
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import as_text_list

_KIND = "edgeclip-labels-1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelSet:
    """Class names with one text embedding each.

    `embeddings` is float32 [K, dim], L2-normalised, made in the embedding space whose
    fingerprint is `space`, from `templates` such as "a photo of a {}".
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]
    space: str
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check names and embeddings.

        Raises:
            InputError: repeated or empty names, or embeddings that do not fit them.
        """
        check_keyed("label", self.names, self.embeddings, self.space)

    def save(self, path: Path) -> None:
        """Write the label set to an npz file, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        meta = {"names": self.names, "templates": self.templates, "space": self.space}
        write_npz(path, _KIND, meta, {"embeddings": self.embeddings})

    @classmethod
    def load(cls, path: Path) -> "LabelSet":
        """Read a label set from an npz file.

        Raises:
            InputError: missing or damaged file, or not a label set.
        """
        keys = frozenset({"names", "templates", "space"})
        meta, arrays = read_npz(path, _KIND, keys, frozenset({"embeddings"}))
        try:
            return cls(
                names=text_tuple(meta["names"]),
                embeddings=arrays["embeddings"],
                space=meta["space"],
                templates=text_tuple(meta["templates"]),
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
) -> LabelSet:
    """Embed label names: each label's embedding is the normalised mean over all templates.

    Source: CLIP's prompt ensembles (Radford et al. 2021, section 3.1.4).

    Args:
        names: the labels.
        templates: sentences, each with one `{}` for the name.
        encode: the text tower, texts -> float32 [N, dim], L2-normalised.
        space: fingerprint of its embedding space.

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
    return LabelSet(names=tuple(names), embeddings=mean, space=space, templates=tuple(templates))
