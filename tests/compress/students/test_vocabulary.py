"""A pruned vocabulary: the same tokens and embeddings for its corpus, and no text is lost."""

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.vocabulary import (
    compare_tokens,
    prune_tokenizer,
    prune_vocabulary,
)
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.bundle.reduction import make_basis
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import FAMILIES

KINDS = ("bytes", "word ends", "continued", "wordpiece", "unigram")
CAPTIONS = tuple(EmojiSource("train", 60, size=32).caption(index) for index in range(60))
OTHERS = tuple(
    EmojiSource("unseen", 40, size=32, distinct=True).caption(index) for index in range(40)
)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer of each kind, trained on repetitive words, where the order of merges matters."""
    words = ("a", "aa", "aaa", "aaaa", "ab", "aba", "abab", "bab", "abc", "cab", "banana", "nana")
    lines = [*CAPTIONS, *(f"{one}{two} {two}" for one in words for two in words)]
    trainer: BpeTrainer | WordPieceTrainer | UnigramTrainer
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "word ends":
        made = Tokenizer(models.BPE(unk_token="?", end_of_word_suffix="</w>"))
        trainer = BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", special_tokens=["?"])
    elif kind == "continued":
        made = Tokenizer(models.BPE(unk_token="?", continuing_subword_prefix="@@"))
        trainer = BpeTrainer(vocab_size=400, continuing_subword_prefix="@@", special_tokens=["?"])
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="?"))
        trainer = WordPieceTrainer(vocab_size=400, special_tokens=["?"])
    else:
        made = Tokenizer(models.Unigram())
        trainer = UnigramTrainer(vocab_size=300, special_tokens=["?"], unk_token="?")
    made.pre_tokenizer = made.pre_tokenizer or pre_tokenizers.Whitespace()
    made.train_from_iterator(lines, trainer)
    return made


def pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[str]]:
    return [row.tokens for row in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


TEXT = st.one_of(
    st.sampled_from(CAPTIONS), st.text(alphabet="abcn é犬", max_size=12), st.text(max_size=6)
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXT, min_size=1, max_size=8), other=TEXT)
@example(texts=["aaaaa", "cabab"], other="banana")
def test_covered_texts_keep_their_tokens_and_no_other_becomes_unknown(
    kind: str, texts: list[str], other: str
) -> None:
    whole = tokenizer_of(kind)
    made = prune_tokenizer(whole, texts)
    small = Tokenizer.from_str(made.json)
    assert pieces(small, texts) == pieces(whole, texts)
    for text in texts:
        ids = small.encode(text, add_special_tokens=False).ids
        assert [made.kept[number] for number in ids] == whole.encode(
            text, add_special_tokens=False
        ).ids
    assert small.get_vocab_size() == len(made.kept) <= whole.get_vocab_size()
    before, after = pieces(whole, [other])[0], pieces(small, [other])[0]
    assert after.count("?") <= before.count("?")
    if kind == "bytes":
        assert "".join(after) == "".join(before)


def test_only_merges_that_are_needed_stay() -> None:
    vocabulary = {name: place for place, name in enumerate(["a", "b", "c", "ab", "abc", "bc"])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c")]
    made = prune_tokenizer(Tokenizer(models.BPE(vocabulary, merges)), ["abc"])
    model = json.loads(made.json)["model"]
    assert model["merges"] == [["a", "b"], ["ab", "c"]]
    assert "bc" not in model["vocab"]


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(ConfigError, match="BPE, WordPiece and Unigram"):
        prune_tokenizer(words, ["a"])


def embedded(dual: DualEncoder, texts: Sequence[str]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = dual.embed_text(dual.tokenize(texts))
    return found


def test_a_pruned_model_embeds_its_corpus_as_before(teacher: DualEncoder, tmp_path: Path) -> None:
    texts = CAPTIONS[:10]
    pruned = prune_vocabulary(teacher, texts)
    assert pruned.spec.text.vocab_size < teacher.spec.text.vocab_size
    assert pruned.space == teacher.space
    pruned.save(tmp_path / "pruned")
    loaded = DualEncoder.load(tmp_path / "pruned")
    assert loaded.space == teacher.space
    assert torch.equal(embedded(loaded, texts), embedded(teacher, texts))
    found = compare_tokens(teacher, pruned, [*texts, *OTHERS])
    assert 10 <= found.same < found.texts == 50
    assert found.before < found.after
    again = prune_vocabulary(pruned, texts)
    assert again.spec == pruned.spec


def test_a_pruned_model_keeps_its_axes(teacher: DualEncoder) -> None:
    model = copy.deepcopy(teacher)
    model.basis = make_basis(np.eye(teacher.spec.dim), teacher.space, (8,))
    assert prune_vocabulary(model, CAPTIONS[:10]).basis is model.basis


def test_the_end_token_never_becomes_the_mark_of_an_old_clip(teacher: DualEncoder) -> None:
    """transformers pools at the largest id where the end token is 2."""
    model: Any = copy.deepcopy(teacher.model)
    tokenizer = copy.deepcopy(teacher.tokenizer)
    old = DualEncoder(model, teacher.image_spec, tokenizer).eval()
    model.config.text_config.eos_token_id = 2
    model.text_model.eos_token_id = 2
    assert old.pools_at_largest_id
    pruned = prune_vocabulary(old, CAPTIONS[:5])
    assert pruned.pools_at_largest_id
    assert torch.equal(embedded(pruned, CAPTIONS[:5]), embedded(old, CAPTIONS[:5]))
    assert not prune_vocabulary(teacher, CAPTIONS[:1]).pools_at_largest_id


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["siglip", "siglip_2", "chinese_clip", "altclip", "metaclip_2", "open_clip", "vit_and_bert",
     "dinov2_and_clip", "convnext_and_roberta"],
)  # fmt: skip
def test_every_family_can_be_pruned(name: str, tmp_path: Path) -> None:
    dual = DualEncoder.load(FAMILIES[name](tmp_path / name).folder)
    texts = [*CAPTIONS[:3], "a photo of a dog"]
    pruned = prune_vocabulary(dual, texts)
    assert pruned.spec.text.vocab_size < dual.spec.text.vocab_size
    pruned.save(tmp_path / "pruned")
    loaded = DualEncoder.load(tmp_path / "pruned")
    assert torch.equal(embedded(loaded, texts), embedded(dual, texts))
    found = compare_tokens(dual, loaded, OTHERS)
    assert found.unknown_after <= found.unknown_before
