from pathlib import Path

import onnx

from edgeclip.export.write_yardstick import main
from edgeclip.runtime.measuring import yardstick


def test_the_kept_graph_is_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "yardstick.onnx"
    assert main([str(path)]) == 0
    kept = Path(yardstick.__file__).with_name("graphs") / "yardstick.onnx"
    assert onnx.load(path) == onnx.load(kept)
    assert path.stat().st_size < 10_000
