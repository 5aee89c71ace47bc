"""`edgeclip export --list`: which devices run here, can be built for here, or must build."""

from edgeclip.export.write_engines import can_build_ahead
from edgeclip.profiles.device import DeviceProfile, device_names, load_device
from edgeclip.runtime.errors import EdgeClipError
from edgeclip.runtime.text_columns import columns


def targets_table() -> str:
    """One line for each known device: engine, precisions, and what this machine can do."""
    rows = [("device", "engine", "precisions", "here")]
    for name in device_names():
        device = load_device(name)
        rows.append((name, device.engine, " ".join(device.precisions), what_can_be_done(device)))
    return columns(rows, left=4)


def what_can_be_done(device: DeviceProfile) -> str:
    """Say whether towers run here, engines can be built here, or the device is needed."""
    if device.engine.startswith("onnxruntime"):
        return _runs(device)
    library, obstacle = can_build_ahead(device)
    if library is None:
        return f"graphs only, engines are built on the device: {obstacle}"
    return f"engines are built here, with {library.title}"


def _runs(device: DeviceProfile) -> str:
    from edgeclip.runtime.providers import provider_of

    try:
        import onnxruntime

        provider = provider_of(device)
        if provider.name not in onnxruntime.get_available_providers():
            return f"graphs only: this onnxruntime has no {provider.name}"
    except (EdgeClipError, ImportError) as error:
        return f"graphs only: {error}"
    return "runs here" if device.name == "this-machine" else "runs here if the processor fits"
