"""Does an exported tower compute what the model in torch computes?"""

import numpy as np

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.embed_pairs import Embedder, embed_all, torch_embedder, tower_inputs
from edgeclip.export.gates import Bounds, data_record, judge_tower
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.spec import Tower

_TOGETHER = 128  # pairs that are compared in batches
_ALONE = 4  # of these, how many run once more by themselves


def check_parity(
    dual: DualEncoder, tower: Tower, embed: Embedder, source: Source, bounds: Bounds
) -> tuple[GateRecord, ...]:
    """Judge a tower against torch on the source's first pairs.

    Inputs come from the runtime's own preprocessing and tokenizer. Some run once more at
    batch 1, texts then without padding, and must give what torch gave for the batch.

    Raises:
        ConfigError: pairs without captions.
        EngineError: the engine cannot run the tower.
    """
    spec, tokenizer = dual.spec, dual.text_tokenizer
    together = tower_inputs(source, tower, spec, tokenizer, count=_TOGETHER)
    candidate, reference = embed_all(together, [embed, torch_embedder(dual, tower)])
    singles = tower_inputs(source, tower, spec, tokenizer, count=_ALONE, batch_size=1)
    (alone,) = embed_all(singles, [embed])
    return judge_tower(
        np.concatenate([candidate, alone]),
        np.concatenate([reference, reference[: len(alone)]]),
        bounds,
        data_record(source, min(len(source), _TOGETHER)),
    )
