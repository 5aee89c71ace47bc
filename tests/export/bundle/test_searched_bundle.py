"""Bundles of what a search chose: the same graph, the same pairs, the same device, or none."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgeclip.compress.data.sources import Source
from edgeclip.export.bundle.build_bundle import BuiltBundle, build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.bundle.write_bundle import BuildRecipe
from edgeclip.export.graph.calibration import calibration_images
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import sha256_graph
from edgeclip.export.quantizing.config import (
    Config,
    Float32,
    StaticInt8,
    WeightOnly,
    config_from_data,
)
from edgeclip.export.quantizing.quantization_file import (
    Quantization,
    SearchBasis,
    TowerQuantization,
)
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.export.quantizing.static_int8 import quantizable_nodes
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Tower

pytestmark = pytest.mark.slow

Make = Callable[..., Source]


@dataclass(frozen=True, slots=True)
class Searched:
    """A plan with what a search chose, and the fp32 graph of the image tower."""

    plan: BundlePlan
    found: Quantization
    image: Path

    def changed(self, tower: Tower, **changes: Any) -> BundlePlan:
        towers = {**self.found.towers, tower: replace(self.found.towers[tower], **changes)}
        return replace(self.plan, quantization=replace(self.found, towers=towers))


@pytest.fixture(scope="module")
def searched(plan: BundlePlan, built: BuiltBundle) -> Searched:
    """Images in int8 but for one product, texts in fp32."""
    paths = {tower: built.bundle.tower_path(tower, "fp32") for tower in plan.towers}
    kept = tuple(quantizable_nodes(paths["image"])[:1])
    mixed = StaticInt8(symmetric=False, reduce_range=True, kept=kept)
    configs: dict[Tower, Config] = {"image": mixed, "text": Float32()}
    passes = [(tower, item.name) for tower, item in built.tried_passes if item.kept]
    found = Quantization(
        basis=SearchBasis.of(plan.device, plan.calibration, pairs=48, ranges=24, timed=True),
        towers={
            tower: TowerQuantization(
                config=configs[tower],
                graph=sha256_graph(path),
                passes=tuple(name for mine, name in passes if mine == tower),
                why="nothing is faster",
            )
            for tower, path in paths.items()
        },
    )
    return Searched(replace(plan, quantization=found, workload=None), found, paths["image"])


def test_a_bundle_holds_what_was_searched_and_nothing_that_has_no_use(
    searched: Searched, tmp_path: Path
) -> None:
    plan, config = searched.plan, searched.found.towers["image"].config
    built = build_bundle(plan, tmp_path / "bundle")
    bundle = built.bundle
    assert bundle.tower_path("image", "fp32").read_bytes() == searched.image.read_bytes()
    form = plan.form
    data = calibration_images(
        plan.calibration, plan.student.spec.image, form.pixels, batch=form.batch
    )
    quantize_graph(searched.image, tmp_path / "int8.onnx", config, data)
    made = bundle.tower_path("image", "int8")
    assert made.read_bytes() == (tmp_path / "int8.onnx").read_bytes()
    recipe = bundle.manifest.tower("image").file("int8").recipe
    assert recipe is not None
    assert config_from_data(recipe.config, source="manifest") == config

    assert bundle.manifest.tower("text").precisions == ("fp32", "fp16")
    line = "text int8: quantization.json has no use for it (nothing is faster)"
    assert built.left_out == (line,)
    with pytest.raises(ConfigError, match=r"\(nothing is faster\): do not ask for it"):
        replace(plan, precisions=("int8",))


def test_another_graph_is_refused(searched: Searched, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text tower is not the one that was searched"):
        build_bundle(searched.changed("text", graph="0" * 64), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_another_device_machine_or_other_pairs_are_refused(searched: Searched, blobs: Make) -> None:
    plan, found = searched.plan, searched.found
    with pytest.raises(ConfigError, match="is for the device 'test-cpu', not 'other'"):
        replace(plan, device=replace(plan.device, name="other"))
    elsewhere = replace(found, basis=replace(found.basis, machine="another CPU"))
    with pytest.raises(ConfigError, match="was timed on another CPU, and this is"):
        replace(plan, quantization=elsewhere)
    with pytest.raises(ConfigError, match="ranges of other pairs than 24 blobs"):
        replace(plan, calibration=blobs(24, seed=5))


@pytest.mark.parametrize(
    ("config", "vnni", "needs"),
    [
        (StaticInt8(symmetric=False), True, True),
        # Found good where its products can overflow.
        (StaticInt8(symmetric=False), False, False),
        (StaticInt8(symmetric=False, reduce_range=True), True, False),
        (WeightOnly(bits=8), True, False),
    ],
)
def test_a_file_needs_the_instructions_that_it_was_judged_with(
    config: Config, vnni: bool, needs: bool, plan: BundlePlan
) -> None:
    recipe = BuildRecipe(
        configs={("image", "int8"): config}, device=replace(plan.device, vnni=vnni)
    )
    assert recipe.needs_vnni(TowerGraph("image", "int8", Path("x"), None)) == needs
    assert not recipe.needs_vnni(TowerGraph("image", "fp32", Path("x"), None))
