"""The bar: a fragile layer is found and kept in float, where the naive recipe collapses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.candidate_evaluator import open_evaluator
from edgeclip.export.quantizing.config import Float32, StaticInt8
from edgeclip.export.quantizing.search import SearchResult, search
from edgeclip.export.quantizing.search_task import SearchSpace, SearchTask
from edgeclip.runtime.device.device_profile import DeviceProfile
from tests.export.quantizing.search_cases import BEHIND_OUTLIER, RECIPE, planted_task, tower_task

Make = Callable[..., Source]
GATE = 0.995


@pytest.fixture(scope="module")
def task(
    clip: DualEncoder,
    clip_towers: TowerPaths,
    cpu_device: DeviceProfile,
    blobs: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> SearchTask:
    """One channel of one LayerNorm is 100 times as large as it was."""
    folder = tmp_path_factory.mktemp("planted")
    return planted_task(clip, clip_towers, folder, cpu_device, blobs)


@pytest.fixture(scope="module")
def mixed(task: SearchTask, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """What is found without smoothing, which would mend the layer instead."""
    with open_evaluator(task, tmp_path_factory.mktemp("points")) as trial:
        return search(trial, SearchSpace(recipe=RECIPE, smoothing=False))


def test_the_naive_recipe_collapses(mixed: SearchResult) -> None:
    naive = next(point for point in mixed.candidates if point.config == RECIPE)
    assert naive.cosine is not None
    assert 1 - naive.cosine.value > 5 * (1 - GATE)  # it loses many times what it may
    assert not naive.passed


def test_the_same_recipe_is_sound_on_the_tower_as_it_was(
    task: SearchTask, clip: DualEncoder, clip_towers: TowerPaths, blobs: Make, tmp_path: Path
) -> None:
    sound = tower_task(clip, clip_towers.image, task.device, blobs)
    with open_evaluator(sound, tmp_path) as trial:
        point = trial.evaluate(RECIPE)
    assert point.passed


def test_the_sensitivity_pass_finds_the_fragile_layer(mixed: SearchResult) -> None:
    assert mixed.damage is not None
    worst, second = mixed.damage.groups[:2]
    assert worst.title == BEHIND_OUTLIER
    assert worst.divergence.low > second.divergence.high


def test_the_fragile_layer_and_nothing_else_is_kept_in_float(mixed: SearchResult) -> None:
    assert mixed.damage is not None
    fragile = mixed.damage.groups[0].nodes
    assert isinstance(mixed.chosen.config, StaticInt8)
    assert mixed.chosen.config.kept == fragile
    assert mixed.chosen.cosine is not None
    assert mixed.chosen.cosine.value > GATE
    (judged,) = mixed.judged
    assert judged.may_ship(accept_undecided=True)


def test_smoothing_mends_it_without_any_float(task: SearchTask, tmp_path: Path) -> None:
    with open_evaluator(task, tmp_path) as trial:
        result = search(trial, SearchSpace(recipe=RECIPE))
    assert isinstance(result.chosen.config, StaticInt8)
    assert result.chosen.config.smoothing
    assert result.chosen.config.kept == ()
    assert result.chosen.config != replace(RECIPE, kept=())
    assert result.candidates[0].config == Float32()
