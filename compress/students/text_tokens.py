"""What a student reads texts with: bytes in place of the teacher's tokens, and smaller vectors."""

import copy
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from edgeclip.compress.students.rebuild import rebuilt, token_table
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.families import text_positions
from edgeclip.runtime.errors import ConfigError

BYTES_PER_TOKEN = 4  # of a vocabulary for many languages (ByT5, Xue et al. 2022, section 3.1)
_BOS, _EOS, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def with_byte_tokens(dual: DualEncoder, *, seed: int = 0) -> DualEncoder:
    """Return a model that reads the bytes of a text, as ByT5 does (Xue et al. 2022).

    No text of any language is unknown to it. The normalisation of texts (such as lower case) is
    that of `dual`, the context four times as long, with positions between those of before. Vectors
    of bytes are those of the characters where `dual` has some, others are random: it has to be
    taught.
    """
    config: Any = copy.deepcopy(dual.model.config)
    text = config.text_config
    before = dual.spec.text
    context = BYTES_PER_TOKEN * before.context_length
    # Some towers count positions from the padding token.
    pad = min(text.pad_token_id or 0, 256)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*names[:pad], _PAD, *names[pad:], _BOS, _EOS]
    tokenizer = _byte_tokenizer(dual, names, context)
    state = dict(dual.model.state_dict())
    for name, weight in state.items():
        if name.startswith("text_model.") and name.endswith(_POSITIONS):
            extra = len(weight) - text_positions(dual.model)
            length = text.max_position_embeddings = extra + context
            state[name] = _longer(weight, extra, length)
    table = token_table(dual)
    state[table] = _byte_vectors(dual, state[table], names, seed)
    text.vocab_size, text.pad_token_id = len(names), pad
    text.bos_token_id = names.index(_BOS)
    if not dual.pools_at_largest_id:  # 2 is then the mark of such a CLIP
        text.eos_token_id = names.index(_EOS)
    return rebuilt(dual, config, state, tokenizer)


_POSITIONS = ("position_embedding.weight", "position_embeddings.weight")


def _byte_tokenizer(dual: DualEncoder, names: list[str], context: int) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    normalizer = Tokenizer.from_str(dual.tokenizer_json()).normalizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = (_PAD, _BOS, _EOS)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in marks])
    first, last = dual.spec.text.frame
    made.post_processor = processors.TemplateProcessing(
        single=" ".join([_BOS] * len(first) + ["$A"] + [_EOS] * len(last)),
        special_tokens=[(name, names.index(name)) for name in (_BOS, _EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=context,
        model_input_names=dual.tokenizer.model_input_names,
    )


def _longer(weight: Tensor, extra: int, length: int) -> Tensor:
    """Resample positions to [length, width]; the first `extra` rows stay as they are."""
    rows = weight[extra:].T[None]
    found = nn.functional.interpolate(rows, length - extra, mode="linear", align_corners=True)
    return torch.cat([weight[:extra], found[0].T])


def _byte_vectors(dual: DualEncoder, table: Tensor, names: list[str], seed: int) -> Tensor:
    spec = dual.spec.text
    known: dict[str, int | None] = dict(dual.tokenizer.get_vocab())
    known |= {_PAD: spec.pad_id, _BOS: spec.bos_id, _EOS: spec.eos_id}
    random = torch.randn(len(names), table.shape[1], generator=torch.Generator().manual_seed(seed))
    vectors = (random * table.std().cpu()).to(table)
    for number, name in enumerate(names):
        theirs = known.get(name)
        if theirs is not None:
            vectors[number] = table[theirs]
    return vectors


def with_token_rank(dual: DualEncoder, rank: int) -> DualEncoder:
    """Return a model whose token embeddings are a table of `rank` numbers and a matrix.

    That is the factorisation of ALBERT (Lan et al. 2020, section 3.1); it begins as the closest one
    to the table of `dual`, by its singular values. All tokens share the matrix.

    Raises:
        ConfigError: `rank` is not below the width of the tower.
    """
    config: Any = copy.deepcopy(dual.model.config)
    state = dict(dual.model.state_dict())
    name = token_table(dual)
    table = state[name]
    if not 1 <= rank < min(table.shape):
        raise ConfigError(
            f"token_rank must be from 1 to {min(table.shape) - 1}, for the token embeddings are "
            f"{table.shape[0]} x {table.shape[1]}, not {rank}"
        )
    left, values, right = torch.linalg.svd(table.float(), full_matrices=False)
    root = values[:rank].sqrt()
    state[name] = (left[:, :rank] * root).to(table)
    state[f"{name.removesuffix('weight')}widen.weight"] = (root[:, None] * right[:rank]).T.to(table)
    config.text_config.token_rank = rank
    return rebuilt(dual, config, state)
