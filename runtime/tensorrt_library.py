"""Which TensorRT is installed, and what it can build engines for."""

import importlib
from dataclasses import dataclass, field
from typing import Any, get_args

from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.engine_key import LibraryName, sm
from edgeclip.runtime.errors import EngineError, MissingExtraError, first_line
from edgeclip.runtime.tensorrt_cuda import gpu_capability

_MENDS: dict[LibraryName, str] = {
    "tensorrt": (
        "pip install 'edgeclip[tensorrt]'; on a Jetson it comes with JetPack, and a virtual "
        "environment sees it when made with --system-site-packages"
    ),
    "tensorrt-rtx": "pip install 'edgeclip[tensorrt-rtx]'",
}


@dataclass(frozen=True, slots=True)
class TensorRtLibrary:
    """An installed TensorRT.

    Attributes:
        name: "tensorrt", or "tensorrt-rtx" for TensorRT for RTX.
        version: such as "10.3.0" or "1.7.1.116".
        module: the imported Python package.
    """

    name: LibraryName
    version: str
    module: Any = field(repr=False, compare=False)

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version.split(".")[0])

    @property
    def title(self) -> str:
        """What a person calls it, such as "TensorRT 10.3.0"."""
        return f"{'TensorRT' if self.name == 'tensorrt' else 'TensorRT-RTX'} {self.version}"

    @property
    def builds_without_gpu(self) -> bool:
        """Whether it builds for GPUs that this machine does not have."""
        return self.name == "tensorrt-rtx"

    def why_not_build(self, device: DeviceProfile) -> str | None:
        """Why this installation cannot build engines for a device; None if it can.

        TensorRT for RTX builds for every GPU that it knows, on any machine. Full TensorRT
        times its kernels, so it builds for the machine's own GPU only.
        """
        wanted = device.compute_capability
        if wanted is None:
            return f"device {device.name!r} has no NVIDIA GPU"
        if self.builds_without_gpu:
            if self.target(wanted) is not None:
                return None
            return f"{self.title} does not build for compute capability {wanted}"
        try:
            found = gpu_capability()
        except (EngineError, MissingExtraError) as error:
            return f"{self.title} builds on a machine with the device's GPU only: {error}"
        if found != wanted:
            return (
                f"{self.title} builds for this machine's GPU (compute capability {found}) only, "
                f"not for {wanted}: build on device {device.name!r} itself"
            )
        return None

    def target(self, capability: str) -> Any | None:
        """TensorRT for RTX's name for a compute capability; None of one it does not know."""
        kinds = getattr(self.module, "ComputeCapability", None)
        return getattr(kinds, sm(capability).upper(), None)


def open_library(device: DeviceProfile) -> TensorRtLibrary:
    """Import the TensorRT that a device asks for.

    Raises:
        EngineError: its engine is not TensorRT by itself, the installation is broken, or
            its major version is not the device's.
        MissingExtraError: it is not installed.
    """
    name = next((known for known in get_args(LibraryName) if known == device.engine), None)
    if name is None:
        raise EngineError(
            f"device {device.name!r} runs on {device.engine}: choose one whose engine is "
            f"{' or '.join(get_args(LibraryName))}"
        )
    library = _import(name)
    wanted = device.tensorrt_major
    if wanted is not None and wanted != library.major:
        raise EngineError(
            f"device {device.name!r} has tensorrt_major {wanted}, but {library.title} is "
            "installed: choose the device that fits, or install the other version"
        )
    return library


def _import(name: LibraryName) -> TensorRtLibrary:
    try:
        module = importlib.import_module(name.replace("-", "_"))
        version = str(module.__version__)
    except ImportError as error:
        raise MissingExtraError(f"{name} is not installed: {_MENDS[name]}") from error
    except Exception as error:  # each release fails in its own way where a library is missing
        raise EngineError(
            f"{name} is installed but cannot start ({first_line(error)}): {_MENDS[name]}"
        ) from error
    return TensorRtLibrary(name, version, module)
