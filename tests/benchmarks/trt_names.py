"""Has every TensorRT of a board what the source calls? Asks NVIDIA's own bindings, without a GPU.

The wheels of the bindings (1 MB each, from PyPI) are imported beside empty libraries in place of
TensorRT's own (2 GB), whose functions return nothing. So names are those of the real bindings, and
what they raise where nothing can be made is what a machine without a driver sees. TensorRT for RTX
is the installed one. The kept result is what `tests/runtime/engines/test_tensorrt_names.py` holds
the source against, without a network.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from _bars import Bar, Rule, finish, hold, options

from tests.runtime.engines.tensorrt_names import required_of

BARS: dict[str, Rule] = {
    "*_missing": ("<=", 0, "names"),
    "*_bare_errors": ("<=", 0, "errors"),
}
# JetPack 6.1 and 6.2 have 10.3, JetPack 7.2 has 10.16, and 11.4 is the first TensorRT 11 there.
WHEELS = (
    ("tensorrt-cu12-bindings", "10.3.0"),
    ("tensorrt-cu12-bindings", "10.16.1.11"),
    ("tensorrt-cu13-bindings", "11.4.0.106"),
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
STUB = """
#define EMPTY(name) void* name(void) { return 0; }
EMPTY(createInferBuilder_INTERNAL) EMPTY(createInferRefitter_INTERNAL)
EMPTY(createInferRuntime_INTERNAL) EMPTY(createNvOnnxParserRefitter_INTERNAL)
EMPTY(createNvOnnxParser_INTERNAL) EMPTY(getBuilderPluginRegistry)
EMPTY(getNvOnnxParserVersion) EMPTY(getPluginRegistry) EMPTY(initLibNvInferPlugins)
"""
ASK = """
import json, sys
package, library, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trt = __import__(package)
def found(name):
    owner = trt
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner is not None
from edgeclip.runtime.engines.tensorrt_library import MessageLog, TensorRtLibrary, create
from edgeclip.runtime.errors import EngineError
log = MessageLog(trt)
own = TensorRtLibrary(library, trt.__version__, trt)
bare = []
for name in ("Runtime", "Builder"):
    try:
        create(own, lambda: getattr(trt, name)(log.logger), log)
    except EngineError as error:
        pass
    except BaseException as error:
        bare.append(f"{name}: {error!r}")
has = sorted(filter(found, names))
print(json.dumps({"version": trt.__version__, "has": has, "bare": bare}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bindings:
    """What the bindings of one version have.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: of the bindings.
        has, missing: names that the source calls.
        bare_errors: errors of the bindings that a user would see as they are.
    """

    library: str
    version: str
    has: tuple[str, ...]
    missing: tuple[str, ...]
    bare_errors: tuple[str, ...]


def unpacked(package: str, version: str, folder: Path) -> Path:
    """Fetch and unpack a wheel, with empty libraries beside it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, f"{package}=={version}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    code = folder / "stub.c"
    code.write_text(STUB, encoding="utf-8")
    for name in LIBRARIES:
        library = folder / f"lib{name}.so.{version.partition('.')[0]}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    return folder


def asked(library: str, package: str, folder: Path | None) -> Bindings:
    """Import the bindings in a process of their own, and ask them."""
    names = required_of(library)
    paths = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)} if folder else {}
    words = [sys.executable, "-c", ASK, package, library, json.dumps(sorted(names))]
    done = subprocess.run(words, env=paths, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{package} cannot be imported:\n{done.stderr}")
    told = json.loads(done.stdout.splitlines()[-1])
    return Bindings(
        library=library,
        version=told["version"],
        has=tuple(told["has"]),
        missing=tuple(sorted(names - set(told["has"]))),
        bare_errors=tuple(told["bare"]),
    )


def bars(found: Bindings) -> list[Bar]:
    name = f"{found.library}_{'.'.join(found.version.split('.')[:2])}"
    return [
        hold(BARS, f"{name}_missing", float(len(found.missing))),
        hold(BARS, f"{name}_bare_errors", float(len(found.bare_errors))),
    ]


def main() -> int:
    args = options(__doc__).parse_args()
    every = [asked("tensorrt-rtx", "tensorrt_rtx", None)]
    for package, version in WHEELS:
        with tempfile.TemporaryDirectory() as name:
            folder = unpacked(package, version, Path(name))
            every.append(asked("tensorrt", "tensorrt_bindings", folder))
    for found in every:
        print(f"{found.library} {found.version}: {len(found.has)} names")
        for line in (*(f"missing: {one}" for one in found.missing), *found.bare_errors):
            print(f"  {line}")
    return finish([bar for found in every for bar in bars(found)], args.out, bindings=every)


if __name__ == "__main__":
    sys.exit(main())
