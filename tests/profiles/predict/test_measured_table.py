import dataclasses

from edgeclip.profiles.predict.measure_probes import measured_table
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.runtime.quality.intervals import Interval
from tests.profiles.predict.known_device import known_device


def test_of_two_towers_the_median_error_lies_between() -> None:
    device = known_device()
    one = next(check for check in device.checks if check.precision == "fp32")
    ms = Predictor(device).predict_parts(one.parts, "fp32").ms
    both = tuple(
        dataclasses.replace(one, ms=Interval(ms / high, ms / high, ms / high))
        for high in (1.1, 1.3)
    )
    table = measured_table(dataclasses.replace(device, checks=both))
    assert "2 whole towers in fp32: predicted within 20.0% (median; worst 30.0%)" in table
