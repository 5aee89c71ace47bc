"""A graph whose weights lie in a file beside it."""

from pathlib import Path


def save_with_data(source: Path, target: Path) -> int:
    """Save a graph as `target`, its weights as `target`_data; the bytes of both."""
    import onnx

    data = target.with_name(f"{target.name}_data")
    onnx.save(
        onnx.load(source),
        target,
        save_as_external_data=True,
        location=data.name,
        size_threshold=64,
    )
    return target.stat().st_size + data.stat().st_size
