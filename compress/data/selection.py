"""Choose the pairs of a batch among more candidates, by what the teacher's cache says of them.

Active curation as in ACID (Udandarao et al. 2024, arXiv 2411.18674) and JEST (Evans et al. 2024,
arXiv 2406.17711), where a sub-batch is drawn of a super-batch by the loss of the student minus that
of the reference (`learnable`), or by the reference alone (`known`, there "easy reference"). Two
things differ. Each pair is the best of its own few candidates, which lie one behind the other, in
place of blocks that are drawn jointly: so the choice does not depend on how a batch is divided
among processes. And the loss of a pair is minus its cosine, without the other texts of a batch:
`learnable` is the teacher's cosine of picture and caption minus the student's.
"""

from typing import Literal

import torch
from torch import Tensor

# `known` costs no reading of pictures and no student; `learnable` embeds all candidates.
Selection = Literal["none", "known", "learnable"]


def best_of_each(scores: Tensor, candidates: int) -> Tensor:
    """Return the place of the highest of each `candidates` scores that follow one another, int64.

    NaN marks what should not be chosen; of equal ones, and where all are NaN, it is the first.

    Raises:
        ValueError: the number of scores is no multiple of `candidates`.
    """
    if len(scores) % candidates:
        raise ValueError(f"{len(scores)} scores are not groups of {candidates}")
    groups = scores.nan_to_num(nan=-torch.inf).reshape(-1, candidates)
    first = torch.arange(len(groups), device=scores.device) * candidates
    return first + groups.argmax(dim=-1)
