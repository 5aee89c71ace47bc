"""Make a model again from a changed config and changed weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from edgeclip.compress.teachers.dual_encoder import DualEncoder


def rebuilt(
    dual: DualEncoder,
    config: Any,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> DualEncoder:
    """Return a model of `config` and `state`; all else, the embedding space too, is that of `dual`.

    Args:
        dual: it is left as it is.
        config: of the new model, a copy.
        state: all its weights.
        tokenizer: its own; None for that of `dual`.

    Raises:
        ConfigError: the config asks for what its towers cannot do.
    """
    model: Any = dual.family.model_class(config)(config)
    model.load_state_dict(state)
    made = DualEncoder(
        model.to(dual.device),
        dual.image_spec,
        tokenizer or dual.tokenizer,
        space=dual.space,
        licence=dual.licence,
    )
    made.basis = dual.basis
    return made.train(dual.training)


def token_table(dual: DualEncoder) -> str:
    """Return the name of the table of token embeddings in the state of a model."""
    tower: Any = dual.model.text_model
    wanted = tower.get_input_embeddings().weight
    return next(name for name, weight in dual.model.named_parameters() if weight is wanted)
