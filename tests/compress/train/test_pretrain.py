import pytest
from transformers import PreTrainedTokenizerFast

from edgeclip.compress.train.pretrain import train_tokenizer

TEXTS = ["red apple left of green tree", "green tree on a blue background", "a red tree"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300, context_length=16)


def test_marks_frame_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("red apple")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == 16


def test_words_of_the_world_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("red tree")["input_ids"]) == 4
    assert len(tokenizer) <= 300


def test_case_and_composition_of_letters_do_not_matter(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer("Red TREE")["input_ids"] == tokenizer("red tree")["input_ids"]
    assert tokenizer("caf\u00e9")["input_ids"] == tokenizer("cafe\u0301")["input_ids"]


@pytest.mark.parametrize("text", ["red apple", "naïve 漢字 🍎", "tab\tand\nline"])
def test_nothing_is_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert str(tokenizer.decode(ids)).strip() == text


def test_training_is_repeatable(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(TEXTS), vocab_size=300, context_length=16)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
