"""Tokens, padding, truncation and refused texts."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import TextSpec

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
CORPUS = [
    "a red apple left of a hot beverage on a blue background",
    "two dogs and the cat's ball, 12 green trees; it's raining!",
    "café über naïve straße 你好 мир",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CLIP's own tokenizer class, on a small byte-pair vocabulary trained here."""
    transformers = pytest.importorskip("transformers", reason="the oracle of these tests")
    make = transformers.CLIPTokenizer
    bare = make(vocab={BOS: 0, EOS: 1, PAD: 2}, merges=[], pad_token=PAD).backend_tokenizer
    trained = Tokenizer(BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    trained.normalizer = bare.normalizer
    trained.pre_tokenizer = bare.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=[BOS, EOS, PAD],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS * 3, trainer)
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    trained.save(str(path))
    model = json.loads(path.read_text())["model"]
    return make(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], pad_token=PAD
    )


@pytest.fixture(scope="module")
def spec(reference: Any) -> TextSpec:
    return TextSpec(context_length=20, vocab_size=len(reference), bos_id=0, eos_id=1, pad_id=2)


@pytest.fixture(scope="module")
def tokenizer(reference: Any, spec: TextSpec, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("saved")
    reference.save_pretrained(folder)
    return TextTokenizer.from_file(folder / "tokenizer.json", spec)


def by_transformers(reference: Any, texts: list[str], **options: Any) -> Any:
    return reference(texts, padding=True, return_tensors="np", **options)["input_ids"]


def test_ids_equal_those_of_transformers(reference: Any, tokenizer: TextTokenizer) -> None:
    texts = ["a red apple", "", "  THE   cat's\n12 balls!  ", "你好 😀"]
    ids = tokenizer.encode(texts)
    assert ids.dtype == np.int64
    assert np.array_equal(ids, by_transformers(reference, texts))
    assert ids[1].tolist() == [0, 1] + [2] * (ids.shape[1] - 2)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_texts_equal_those_of_transformers(
    reference: Any, tokenizer: TextTokenizer, texts: list[str]
) -> None:
    ids = tokenizer.encode(texts, truncate=True)
    expected = by_transformers(reference, texts, truncation=True, max_length=20)
    assert np.array_equal(ids, expected)


def test_special_words_inside_a_text_are_what_transformers_makes_of_them(
    reference: Any, tokenizer: TextTokenizer
) -> None:
    texts = [f"a {EOS} dog", BOS]
    assert np.array_equal(tokenizer.encode(texts), by_transformers(reference, texts))


@pytest.mark.parametrize("post", ["none", "template", "only start"])
def test_the_file_may_bring_any_post_processor(
    post: str, reference: Any, spec: TextSpec, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["post_processor"] = None
    raw = Tokenizer.from_str(json.dumps(data))
    if post != "none":
        single = f"{BOS} $A {EOS}" if post == "template" else f"{BOS} $A"
        raw.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(BOS, 0), (EOS, 1)]
        )
    raw.save(str(path))
    texts = ["a red apple", "cat"]
    other = TextTokenizer.from_file(path, spec)
    assert np.array_equal(other.encode(texts), tokenizer.encode(texts))


def test_padding_and_truncation_of_the_file_are_switched_off(
    reference: Any, spec: TextSpec, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = Tokenizer.from_file(str(path))
    raw.enable_padding(length=64, pad_id=2, pad_token=PAD)
    raw.enable_truncation(max_length=3)
    raw.save(str(path))
    texts = ["a red apple on a blue background"]
    other = TextTokenizer.from_file(path, spec)
    assert np.array_equal(other.encode(texts), tokenizer.encode(texts))
    assert other.encode(texts).shape[1] < 20


def test_the_batch_is_as_long_as_its_longest_text(tokenizer: TextTokenizer) -> None:
    texts = ["a", "a red apple", ""]
    counts = tokenizer.token_counts(texts)
    ids = tokenizer.encode(texts)
    assert ids.shape == (3, max(counts))
    for row, count in zip(ids, counts, strict=True):
        assert row[0] == 0
        assert row[count - 1] == 1
        assert (row[count:] == 2).all()


def test_a_long_text_is_refused_with_its_number_count_and_limit(
    tokenizer: TextTokenizer,
) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.encode(["short", "apple " * 500])
    assert str(caught.value).startswith("text 1 has 502 tokens")
    assert "limit is 20" in str(caught.value)
    assert "truncate" in str(caught.value)


def test_truncation_keeps_the_end_mark_and_counts(
    tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="edgeclip"):
        ids = tokenizer.encode(["apple " * 500, "red", "apple " * 19], truncate=True)
    assert ids.shape == (3, 20)
    assert ids[0, 0] == 0
    assert ids[0, -1] == 1
    assert (ids[0, 1:-1] > 2).all()
    assert "2 of 3 texts were cut to 20 tokens" in caplog.text


def test_a_text_that_just_fits_is_not_cut(tokenizer: TextTokenizer) -> None:
    texts = ["apple " * 18]
    assert tokenizer.token_counts(texts) == (20,)
    assert np.array_equal(tokenizer.encode(texts), tokenizer.encode(texts, truncate=True))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a dog", "put the one text into a list"),
        ([], "no texts"),
        (["a", None], "text 1 is NoneType"),
        (["a", b"dog"], "text 1 is bytes"),
        (["\ud800"], "text 0 is not valid Unicode"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: TextTokenizer, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer.encode(texts)


def test_damaged_or_foreign_files_are_refused(
    tokenizer: TextTokenizer, reference: Any, spec: TextSpec, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        TextTokenizer.from_file(tmp_path / "missing.json", spec)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    small = TextSpec(context_length=20, vocab_size=100, bos_id=0, eos_id=1, pad_id=2)
    with pytest.raises(ConfigError, match="only 100"):
        TextTokenizer.from_file(path, small)
    foreign = TextSpec(context_length=20, vocab_size=50_000, bos_id=0, eos_id=49_407, pad_id=2)
    with pytest.raises(ConfigError, match="no token 49407, the end"):
        TextTokenizer.from_file(path, foreign)
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        TextTokenizer.from_file(path, spec)


def test_texts_without_a_start_token_fill_the_context(
    reference: Any, tokenizer: TextTokenizer
) -> None:
    """As SigLIP's: the text, an end token, padding to the end of the context."""
    usual = tokenizer.encode(["a red apple", ""])
    spec = replace(tokenizer.spec, bos_id=None, pad_to_context=True)
    found = TextTokenizer(Tokenizer.from_str(reference.backend_tokenizer.to_str()), spec)
    ids = found.encode(["a red apple", ""])
    assert ids.shape == (2, 20)
    inner = usual[0, 1:].tolist()
    assert ids[0].tolist() == inner + [2] * (20 - len(inner))
    assert ids[1].tolist() == [1] + [2] * 19
    assert found.token_counts(["", "a red apple"]) == (1, len(inner))
    cut = found.encode(["red " * 40], truncate=True)[0]
    assert cut[-1] == 1
    assert 2 not in cut
