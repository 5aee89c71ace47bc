"""Merge the patches of a student's image tower: fewer tokens in its later layers.

The patches that are merged, and how many, are the same for every picture: two by two neighbours
after chosen layers, so that 64 patches become 16. What remains is a grid, so that patch features,
cuts and int8 go on as before. Matching the tokens of each picture that are most alike (ToMe, Bolya
et al. 2023) leaves tokens anywhere, and costs a sort and gathers in every graph, which on a CPU eat
up much of what they save: `tests/benchmarks/token_merging.py` times both.
"""

import copy
from collections.abc import Sequence
from typing import Any

from edgeclip.compress.students.rebuild import rebuilt
from edgeclip.compress.teachers.dual_encoder import DualEncoder


def with_merging(dual: DualEncoder, after: Sequence[int]) -> DualEncoder:
    """Return a model whose patches are merged two by two after these layers, counted from 1.

    The weights are those of `dual`, and so is the embedding space that it is recorded in: it has to
    be taught what its last layers now see.

    Raises:
        ConfigError: no ViT, layers that it has not, or more merging than there are patches.
    """
    config: Any = copy.deepcopy(dual.model.config)
    config.vision_config.merge_after = list(after)
    return rebuilt(dual, config, dual.model.state_dict())
