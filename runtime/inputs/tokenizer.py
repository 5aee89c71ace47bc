"""Tokenize texts for the text tower, with the `tokenizers` package only."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.spec import TextSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)


class TextTokenizer:
    """The tokenizer of a text tower: start token, the text's tokens, end token, padding.

    Start and end tokens are added here, so it does not matter whether tokenizer.json has a
    post-processor; its own padding and truncation are switched off.

    Raises:
        ConfigError: the vocabulary does not fit `spec`.
    """

    def __init__(self, tokenizer: "Tokenizer", spec: TextSpec) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if size > spec.vocab_size:
            raise ConfigError(
                f"the tokenizer has {size} tokens, the text tower only {spec.vocab_size}: "
                "they do not belong together"
            )
        for name, token in (("start", spec.bos_id), ("end", spec.eos_id)):
            if token is not None and tokenizer.id_to_token(token) is None:
                raise ConfigError(f"the tokenizer has no token {token}, the {name} token of a text")
        self._tokenizer = tokenizer
        self.spec = spec

    @classmethod
    def from_file(cls, path: Path, spec: TextSpec) -> "TextTokenizer":
        """Read a tokenizer.json.

        Raises:
            ConfigError: missing or damaged file, or a vocabulary that does not fit `spec`.
        """
        from tokenizers import Tokenizer

        if not path.is_file():
            raise ConfigError(f"tokenizer {path} does not exist: check the path")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer.json ({error})") from error
        return cls(tokenizer, spec)

    def encode(
        self, texts: Sequence[str], *, truncate: bool = False, first: int = 0
    ) -> NDArray[np.int64]:
        """Tokenize texts to int64 ids [N, L]; L is the longest text with start and end token.

        Shorter texts are padded with `pad_id` on the right, with `pad_to_context` to the whole
        context. An empty text has only the start and end token. A text longer than
        `context_length` is refused; with `truncate` it is cut before the end token, and a warning
        with the number of such texts is logged. `first` is the number of the first text in a
        longer list, for the messages.

        Raises:
            InputError: no texts, one `str` in place of a list, an item that is not `str`
                or not valid Unicode, or a text that is too long (numbers count from `first`).
        """
        limit = self.spec.context_length
        rows = self._token_ids(texts, first)
        long = [number for number, ids in enumerate(rows) if len(ids) + self._marks > limit]
        if long and not truncate:
            number = long[0]
            raise InputError(
                f"text {first + number} has {len(rows[number]) + self._marks} tokens with its "
                f"start and end token, the limit is {limit}: shorten it, or ask to truncate"
            )
        if long:
            _log.warning("%d of %d texts were cut to %d tokens", len(long), len(rows), limit)
        return self._pad([ids[: limit - self._marks] for ids in rows])

    def token_counts(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Count the tokens of each text, with start and end token, without truncation.

        Raises:
            InputError: as `encode`, except for long texts.
        """
        return tuple(len(ids) + self._marks for ids in self._token_ids(texts))

    @property
    def _marks(self) -> int:
        """Number of start and end tokens of a text."""
        return sum(map(len, self.spec.frame))

    def _token_ids(self, texts: Sequence[str], first: int = 0) -> list[list[int]]:
        _check_texts(texts, first)
        plain = [str(text) for text in texts]  # not a subclass, such as numpy's
        encodings = self._tokenizer.encode_batch(plain, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _pad(self, rows: list[list[int]]) -> NDArray[np.int64]:
        before, behind = self.spec.frame
        length = max(len(ids) for ids in rows) + self._marks
        if self.spec.pad_to_context:
            length = self.spec.context_length
        padded = np.full((len(rows), max(1, length)), self.spec.pad_id, dtype=np.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids) + self._marks] = [*before, *ids, *behind]
        return padded


def _check_texts(texts: Sequence[str], first: int) -> None:
    if isinstance(texts, str | bytes):
        raise InputError("a batch is a list of texts: put the one text into a list")
    if len(texts) == 0:
        raise InputError("no texts were given: a batch needs at least one")
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise InputError(f"text {number} is {type(text).__name__}: convert it to str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text {number} is not valid Unicode ({error.reason}): decode its bytes "
                "with the right encoding"
            ) from error
