"""Prune a text tower's vocabulary to a corpus, with exactly the same embeddings for its texts.

A kept tokenizer must cut every text of the corpus into the tokens of before:

- BPE (Sennrich et al. 2016) applies, of all merges that fit, the first of its list. Of a subset of
  the merges that holds all that were applied to a word, it applies the same ones in the same order.
  Inside a token only that token's own merges were applied, so these are found token by token.
- WordPiece takes the longest token that fits, which is still there.
- Unigram (Kudo 2018) takes the tokens of the highest sum of scores, which no subset can exceed. The
  lowest score is kept, because the score of an unknown character depends on it.

What single characters and bytes need is kept as well, so that any other text becomes more and
smaller tokens, and none that was known becomes unknown.
"""

import copy
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer

from edgeclip.compress.students.rebuild import rebuilt, token_table
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.read_tokenizer import as_generic
from edgeclip.runtime.errors import ConfigError

_AT_ONCE = 4096  # texts that are tokenized
_EMBEDDED = 256  # texts at most whose embeddings are compared
# transformers takes the end token 2 for the mark of an old CLIP, see
# `DualEncoder.pools_at_largest_id`, and RoBERTa counts positions from its padding token.
_FIXED = range(4)
_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")


@dataclass(frozen=True, slots=True)
class PrunedTokenizer:
    """A smaller tokenizer.

    Attributes:
        json: as `tokenizers` reads it.
        kept: the id that each token had before, ascending; its place is its new id.
    """

    json: str
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChange:
    """What another tokenizer makes of some texts.

    Attributes:
        texts: number of texts.
        same: how many of them have the same tokens.
        before, after: tokens of all texts.
        unknown_before, unknown_after: how many of these are the unknown token.
    """

    texts: int
    same: int
    before: int
    after: int
    unknown_before: int
    unknown_after: int


def prune_vocabulary(dual: DualEncoder, texts: Sequence[str]) -> DualEncoder:
    """Return a model whose text tower has vectors for the tokens of `texts`, and of characters.

    It stays in the embedding space of `dual`, which is left as it is. All texts are tokenized by
    both, and some hundred embedded: they are the same, bit by bit.

    Raises:
        ConfigError: a tokenizer that is neither BPE, WordPiece nor Unigram; or one that would
            tokenize or embed a text otherwise.
    """
    whole = Tokenizer.from_str(dual.tokenizer_json())
    config: Any = copy.deepcopy(dual.model.config)
    text = config.text_config
    marks = {getattr(text, name, None) for name in _MARKS}
    spec = dual.spec.text
    marks |= {spec.bos_id, spec.eos_id, spec.pad_id, *dual.tokenizer.all_special_ids}
    always = {number for number in marks if number is not None}
    made = prune_tokenizer(whole, texts, always)
    new_ids = {old: new for new, old in enumerate(made.kept)}
    _refuse_other_tokens(whole, Tokenizer.from_str(made.json), made, texts)
    text.vocab_size = len(made.kept)
    for name in _MARKS:
        number = getattr(text, name, None)
        if number in new_ids and not (name == "eos_token_id" and dual.pools_at_largest_id):
            setattr(text, name, new_ids[number])
    state = dict(dual.model.state_dict())
    table = token_table(dual)
    state[table] = state[table][torch.tensor(made.kept, device=dual.device)]
    tokenizer = as_generic(dual.tokenizer, Tokenizer.from_str(made.json))
    pruned = rebuilt(dual, config, state, tokenizer)
    _refuse_other_embeddings(dual, pruned, texts[:: max(1, len(texts) // _EMBEDDED)])
    return pruned


def _refuse_other_tokens(
    whole: Tokenizer, small: Tokenizer, made: PrunedTokenizer, texts: Sequence[str]
) -> None:
    for text, before, after in _both(whole, small, texts):
        if before != [made.kept[number] for number in after]:
            raise ConfigError(
                f"the pruned tokenizer would tokenize {text[:40]!r} otherwise: the vocabulary of "
                "this model cannot be pruned"
            )


def _refuse_other_embeddings(whole: DualEncoder, small: DualEncoder, texts: Sequence[str]) -> None:
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            part = texts[start : start + 64]
            before, after = (own.embed_text(own.tokenize(part)) for own in (whole, small))
            if not torch.equal(before, after):
                raise ConfigError(
                    f"the pruned model would embed {part[0][:40]!r} or a text near it otherwise: "
                    "the vocabulary of this model cannot be pruned"
                )


def compare_tokens(before: DualEncoder, after: DualEncoder, texts: Sequence[str]) -> TokenChange:
    """Count how many of some texts a pruned model tokenizes as the model that it was made of."""
    tokenizers = tuple(Tokenizer.from_str(own.tokenizer_json()) for own in (before, after))
    names = [own.tokenizer.unk_token for own in (before, after)]
    unknown = [
        -1 if name is None else own.get_vocab(True)[name]
        for own, name in zip(tokenizers, names, strict=True)
    ]
    same, counts, unknowns = 0, [0, 0], [0, 0]
    for _, *rows in _both(tokenizers[0], tokenizers[1], texts):
        pieces = [
            [own.id_to_token(number) for number in row]
            for own, row in zip(tokenizers, rows, strict=True)
        ]
        same += pieces[0] == pieces[1]
        for place, row in enumerate(rows):
            counts[place] += len(row)
            unknowns[place] += row.count(unknown[place])
    return TokenChange(
        texts=len(texts),
        same=same,
        before=counts[0],
        after=counts[1],
        unknown_before=unknowns[0],
        unknown_after=unknowns[1],
    )


def _both(
    one: Tokenizer, other: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        rows = (own.encode_batch(part, add_special_tokens=False) for own in (one, other))
        for text, ours, theirs in zip(part, *rows, strict=True):
            yield text, ours.ids, theirs.ids


def prune_tokenizer(
    tokenizer: Tokenizer, texts: Iterable[str], always: Collection[int] = ()
) -> PrunedTokenizer:
    """Keep the tokens of `texts`, what any other text needs, added tokens, and the ids `always`.

    Raises:
        ConfigError: neither BPE, WordPiece nor Unigram, or ids that cannot be closed up.
    """
    data = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = {number: token for token, number in vocabulary.items()}
    model, kind = data["model"], data["model"]["type"]
    if kind not in _KEEP:
        raise ConfigError(
            f"its tokenizer is a {kind} model: only the vocabularies of BPE, WordPiece and Unigram "
            "can be pruned"
        )
    used: set[int] = set()
    listed = list(texts)
    for start in range(0, len(listed), _AT_ONCE):
        part = listed[start : start + _AT_ONCE]
        for row in tokenizer.encode_batch(part, add_special_tokens=False):
            used.update(row.ids)
    fixed = {*always, *_FIXED, *(item["id"] for item in data["added_tokens"])}
    fixed.update(_ids_of_marks(data["post_processor"]))
    wanted = {tokens[number] for number in used | fixed if number in tokens}
    if model.get("unk_token"):
        wanted.add(model["unk_token"])
    names = _KEEP[kind](model, wanted)
    kept = tuple(sorted(vocabulary[name] for name in names | wanted if name in vocabulary))
    new_ids = {old: new for new, old in enumerate(kept)}
    _cut_model(model, {tokens[number] for number in kept}, vocabulary, new_ids)
    for item in data["added_tokens"]:
        item["id"] = new_ids[item["id"]]
    _renumber_marks(data["post_processor"], new_ids)
    found = json.dumps(data, ensure_ascii=False)
    made = Tokenizer.from_str(found).get_vocab(with_added_tokens=True)
    if made != {tokens[old]: new for old, new in new_ids.items()}:
        raise ConfigError(
            "its tokenizer has tokens that were added in the midst of its vocabulary: it cannot be "
            "pruned"
        )
    return PrunedTokenizer(found, kept)


def _keep_of_bpe(model: Mapping[str, Any], wanted: Collection[str]) -> set[str]:
    """Return what no merge makes, and all that the merges of the wanted tokens make."""
    prefix, suffix = (
        model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    made = {first + second.removeprefix(prefix) for first, second in ranks}
    kept = set(model["vocab"]) - made
    for token in made.intersection(wanted):
        kept.update(_merged(_symbols(token, prefix, suffix), ranks, prefix))
    return kept


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    """Return the characters of a token as a tokenizer begins with them: `##a`, `b</w>`."""
    continues = bool(prefix) and token.startswith(prefix)
    ends = bool(suffix) and token.endswith(suffix)
    letters = list(token.removeprefix(prefix).removesuffix(suffix))
    found = [
        prefix + letter if place or continues else letter for place, letter in enumerate(letters)
    ]
    if ends and found:
        found[-1] += suffix
    return found


def _merged(symbols: list[str], ranks: Mapping[tuple[str, ...], int], prefix: str) -> set[str]:
    """Apply the merges to the characters of a word; return everything that they made."""
    found: set[str] = set()
    while len(symbols) > 1:
        pairs = [
            (ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks
        ]
        if not pairs:
            break
        _, place = min(pairs)
        joined = symbols[place] + symbols[place + 1].removeprefix(prefix)
        symbols[place : place + 2] = [joined]
        found.add(joined)
    return found


def _keep_of_wordpiece(model: Mapping[str, Any], wanted: Collection[str]) -> set[str]:
    """Return the single characters, and tokens with a character that has no token of its own."""
    prefix = model["continuing_subword_prefix"]

    def letters(token: str) -> list[str]:
        return _symbols(token, prefix, "")

    return _covering(model["vocab"], letters)


def _keep_of_unigram(model: Mapping[str, Any], wanted: Collection[str]) -> set[str]:
    """Return likewise; bytes, the unknown token and that of the lowest score too."""
    names = [piece for piece, _ in model["vocab"]]
    kept = _covering(names, list)
    kept.add(min(model["vocab"], key=lambda item: item[1])[0])
    if model.get("unk_id") is not None:
        kept.add(names[model["unk_id"]])
    if model.get("byte_fallback"):
        kept.update(name for name in names if name.startswith("<0x") and len(name) == 6)
    return kept


def _covering(names: Iterable[str], letters: Any) -> set[str]:
    by_letters = {name: letters(name) for name in names}
    single = {own[0] for own in by_letters.values() if len(own) == 1}
    return {name for name, own in by_letters.items() if len(own) == 1 or not single.issuperset(own)}


_KEEP = {"BPE": _keep_of_bpe, "WordPiece": _keep_of_wordpiece, "Unigram": _keep_of_unigram}


def _cut_model(
    model: dict[str, Any],
    names: set[str],
    vocabulary: Mapping[str, int],
    new_ids: Mapping[int, int],
) -> None:
    """Leave the tokens `names` in a model of `tokenizers`, in place."""
    if model["type"] == "Unigram":
        pieces = [piece for piece, _ in model["vocab"]]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[vocabulary[pieces[model["unk_id"]]]]
        model["vocab"] = [item for item in model["vocab"] if item[0] in names]
        return
    model["vocab"] = {
        name: new_ids[number] for name, number in model["vocab"].items() if name in names
    }
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [first, second]
            for first, second in model["merges"]
            if {first, second, first + second.removeprefix(prefix)} <= names
        ]


def _ids_of_marks(processor: Mapping[str, Any] | None) -> Iterator[int]:
    """Yield the ids of the tokens that a post-processor puts around a text."""
    for part in _parts(processor):
        for item in part.get("special_tokens", {}).values():
            yield from item["ids"]
        for name in ("sep", "cls"):
            if name in part:
                yield part[name][1]


def _renumber_marks(processor: Any, new_ids: Mapping[int, int]) -> None:
    for part in _parts(processor):
        for item in part.get("special_tokens", {}).values():
            item["ids"] = [new_ids[number] for number in item["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name][1] = new_ids[part[name][1]]


def _parts(processor: Any) -> Iterator[dict[str, Any]]:
    """Yield a post-processor, or those of a sequence."""
    if processor is None:
        return
    if processor["type"] == "Sequence":
        for part in processor["processors"]:
            yield from _parts(part)
    else:
        yield processor
