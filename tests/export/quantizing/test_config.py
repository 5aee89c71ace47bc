import dataclasses
import json
from typing import Any

import pytest

from edgeclip.export.quantizing.activation_ranges import Ranging
from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    Float32,
    StaticInt8,
    WeightOnly,
    config_from_data,
    default_config,
    describe,
    key,
    needs_vnni,
    precision_of,
)
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Precision

FULL = StaticInt8(
    symmetric=True,
    per_channel=False,
    ranging=Ranging(method="percentile", percentile=99.9),
    kept=("first", "second"),
    smoothing=(("norm", 0.5),),
    float_precision="fp16",
)
EVERY: list[tuple[Config, Precision, bool, str]] = [
    (Float32(), "fp32", False, "fp32"),
    (Float16(), "fp16", False, "fp16"),
    (Float16(islands=("a", "b")), "fp16", False, "fp16, 2 nodes in fp32"),
    (StaticInt8(symmetric=False), "int8", True, "int8, asymmetric"),
    (
        StaticInt8(symmetric=False, reduce_range=True, int8_tables=True, kept=("a",)),
        "int8",
        False,
        "int8, asymmetric, 7-bit weights, int8 tables, 1 node in float",
    ),
    (
        FULL,
        "int8",
        False,
        "int8, symmetric, one scale for each weight, ranges by percentile 99.9, 1 LayerNorm "
        "smoothed, fp16 between, 2 nodes in float",
    ),
    (DynamicInt8(), "int8", True, "dynamic int8"),
    (DynamicInt8(reduce_range=True), "int8", False, "dynamic int8, 7-bit weights"),
    (WeightOnly(bits=4, block=64), "int8", False, "4-bit weights, blocks of 64"),
    (Float8(kept=("a",)), "fp8", False, "fp8, 1 node in float"),
]
configs = pytest.mark.parametrize("config", [row[0] for row in EVERY], ids=[r[3] for r in EVERY])


@configs
def test_json_and_back(config: Config) -> None:
    text = json.dumps(dataclasses.asdict(config))
    assert config_from_data(json.loads(text), source="test") == config
    assert hash(config) == hash(config_from_data(json.loads(text), source="test"))


@pytest.mark.parametrize(("config", "precision", "vnni", "words"), EVERY)
def test_what_a_config_is(config: Config, precision: Precision, vnni: bool, words: str) -> None:
    assert precision_of(config) == precision
    assert needs_vnni(config) == vnni
    assert describe(config) == words


def test_keys_differ_exactly_where_configs_do() -> None:
    assert len({key(row[0]) for row in EVERY}) == len(EVERY)
    assert key(Float16(islands=("a", "b"))) == key(Float16(islands=("b", "a")))
    whole = StaticInt8(symmetric=False, smoothing=(("a", 1), ("b", 0)))
    assert key(whole) == key(dataclasses.replace(whole, smoothing=(("b", 0.0), ("a", 1.0))))
    assert key(whole) != key(dataclasses.replace(whole, smoothing=(("b", 0.0), ("a", 0.9))))
    assert len(key(Float32())) == 64


def test_all_mistakes_are_in_one_message() -> None:
    with pytest.raises(ValueError, match="reduce_range") as caught:
        StaticInt8(
            symmetric=True,
            reduce_range=True,
            int8_tables=True,
            kept=("", "x", "x"),
            smoothing=(("norm", 1.5), ("norm", 0.5)),
        )
    message = str(caught.value)
    for part in ("kept: a name is empty", "kept: x is there twice", "alpha of norm", "1.5"):
        assert part in message
    assert "smoothing: norm is there twice" in message
    assert "int8_tables" in message
    with pytest.raises(ValueError, match="float_precision"):
        StaticInt8(symmetric=False, float_precision="fp16")


@pytest.mark.parametrize("kind", [Float16, DynamicInt8, Float8])
def test_names_are_checked_everywhere(kind: Any) -> None:
    field = "islands" if kind is Float16 else "kept"
    with pytest.raises(ValueError, match=f"{field}: a is there twice"):
        kind(**{field: ("a", "a")})


def test_bits_and_blocks_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be 4 or 8, got 3; block must be .* 48"):
        WeightOnly(bits=3, block=48)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "config: input should be an object"),
        ({}, "unable to extract tag using discriminator 'kind'"),
        ({"kind": "int3"}, "expected tags: 'fp32', 'fp16', 'static-int8'"),
        ({"kind": "fp16", "kept": []}, "kept: unknown key"),
        ({"kind": "static-int8"}, "symmetric"),
        ({"kind": "static-int8", "symmetric": 1}, "valid boolean"),
        ({"kind": "static-int8", "symmetric": True, "ranging": {"method": "best"}}, "ranging"),
        ({"kind": "weight-only", "bits": 5}, "bits"),
        ({"kind": "static-int8", "symmetric": True, "reduce_range": True}, "reduce_range"),
    ],
)
def test_data_that_is_no_config_is_refused(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_data(data, source="candidates.json")
    assert "candidates.json" in str(caught.value)


OLD = dataclasses.asdict(StaticInt8(symmetric=False)) | {
    "equalised": False,
    "bias_corrected": False,
}


def test_a_config_of_an_older_version_is_read() -> None:
    assert config_from_data(OLD, source="old.json") == StaticInt8(symmetric=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"equalised": True, "bias_corrected": True}, "equalised, bias_corrected"),
        ({"ranging": {"method": "mse", "percentile": 99.99}}, "ranges by mse"),
        ({"ranging": {"method": "entropy", "percentile": 99.99}}, "ranges by entropy"),
    ],
)
def test_a_remedy_that_was_removed_says_to_search_again(
    change: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"old.json uses {named}, .*search again"):
        config_from_data(OLD | change, source="old.json")


@pytest.mark.parametrize(
    ("device", "config"),
    [
        ("x86-avx2", StaticInt8(symmetric=False, reduce_range=True)),
        ("x86-avx512-vnni", StaticInt8(symmetric=False)),
        ("arm64-dotprod", StaticInt8(symmetric=False)),
        ("jetson-orin-nano", StaticInt8(symmetric=True, float_precision="fp16")),
    ],
)
def test_defaults_follow_the_device(device: str, config: Config) -> None:
    profile = load_device(device)
    assert default_config("int8", profile) == config
    others: tuple[Precision, ...] = ("fp32", "fp16", "fp8")
    made = [default_config(precision, profile) for precision in others]
    assert made == [Float32(), Float16(), Float8()]
