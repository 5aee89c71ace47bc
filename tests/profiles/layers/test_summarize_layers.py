import time

import pytest

from edgeclip.profiles.layers.summarize_layers import Layer, run_alternately, summarize_layers
from edgeclip.runtime.errors import InputError


def _layer(name: str) -> Layer:
    return Layer(name=name, op="MatMul", provider="here", flops=10.0, bytes=None)


def test_medians_over_runs_the_slowest_first() -> None:
    runs = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 3.0}]
    layers = {"a": _layer("a"), "b": _layer("b")}
    profile = summarize_layers("a clock", layers, runs, [4.0, 3.0, 100.0])
    assert [(layer.name, layer.ms) for layer in profile.layers] == [("b", 3.0), ("a", 1.0)]
    assert [layer.share for layer in profile.layers] == [0.75, 0.25]
    assert (profile.runs, profile.total_ms, profile.plain_ms) == (3, 5.0, 4.0)
    assert (profile.source, profile.layers[0].flops) == ("a clock", 10.0)


def test_a_layer_that_a_run_lacks_took_no_time() -> None:
    profile = summarize_layers("", {"a": _layer("a")}, [{}, {}, {"a": 1.0}], [1.0])
    assert [(layer.ms, layer.share) for layer in profile.layers] == [(0.0, 0.0)]


def test_turns_alternate_and_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls: list[str] = []

    def run(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds * (1 if len(calls) < 4 else 10)
        calls.append(name)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    plain_ms = run_alternately(
        lambda: run("plain", 0.001), lambda: run("profiled", 1), runs=3, warm_up=2
    )
    assert plain_ms == pytest.approx([10, 10, 10])
    assert calls[:4] == ["plain", "profiled", "profiled", "plain"]
    assert calls.count("plain") == calls.count("profiled") == 5


def test_no_runs() -> None:
    with pytest.raises(InputError, match="at least 1 run"):
        run_alternately(lambda: None, lambda: None, runs=0, warm_up=1)
