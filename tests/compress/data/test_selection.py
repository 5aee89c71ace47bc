import pytest
from torch import nan, tensor

from edgeclip.compress.data.selection import best_of_each


def test_the_best_of_each_few_candidates() -> None:
    scores = tensor([0.1, 0.3, 0.2, nan, -5.0, nan, nan, nan, nan, 7.0, 7.0, 1.0])
    assert best_of_each(scores, 3).tolist() == [1, 4, 6, 9]
    assert best_of_each(scores, 1).tolist() == list(range(12))
    with pytest.raises(ValueError, match="12 scores are not groups of 5"):
        best_of_each(scores, 5)
