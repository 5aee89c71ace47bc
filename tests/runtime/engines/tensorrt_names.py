"""The names of TensorRT's Python bindings that the source uses, read from its text.

An object of TensorRT is known by the name of its variable: `context` is an `IExecutionContext`.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]
FILES = (
    "profiles/layers/tensorrt_layers.py",
    "runtime/engines/tensorrt_build.py",
    "runtime/engines/tensorrt_engine.py",
    "runtime/engines/tensorrt_library.py",
)
MODULE = "trt"
# Variables and attributes by their names without underscores, and the class of each.
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
}
# TensorRT for RTX has classes of its own for what is compiled where an engine runs.
OF_RTX = {
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
}
# It measures no kernels, so it has no timings to keep.
NOT_OF_RTX = {
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.set_timing_cache",
    "ITimingCache.serialize",
}
_OTHERS = {
    "IBuilderConfig.create_runtime_cache": "IRuntimeConfig.create_runtime_cache",
    "IBuilderConfig.set_runtime_cache": "IRuntimeConfig.set_runtime_cache",
    "ITimingCache.deserialize": "IRuntimeCache.deserialize",
}
# Of our own engines and recorders, which share a variable's name.
_OWN = {"ICudaEngine.name", "ICudaEngine.run", "ICudaEngine.context"}


def used_names() -> set[str]:
    """Every name that is used: `Builder`, `BuilderFlag.TF32`, `IExecutionContext.engine`."""
    found = {"IRuntimeCache.serialize"}  # its variable is named as that of a timing cache
    for file in FILES:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found |= _names_of(node)
    return found - _OWN


def _names_of(node: ast.Attribute) -> set[str]:
    chain = [node.attr]
    part: ast.expr = node.value
    while isinstance(part, ast.Attribute):
        chain.append(part.attr)
        part = part.value
    if isinstance(part, ast.Name):
        chain.append(part.id)
    names = [name.strip("_") for name in reversed(chain)]
    if node.attr.startswith("_"):
        return set()
    for start in ("module", MODULE):
        if start in names[:-1]:
            return {".".join(names[names.index(start) + 1 :])}
    owner = CLASSES.get(names[-2]) if len(names) > 1 else None
    if owner is None:
        return set()
    name = f"{owner}.{node.attr}"
    return {_OTHERS.get(name, name)}


def required_of(library: str) -> set[str]:
    """What `tensorrt` or `tensorrt-rtx` must have."""
    return used_names() - (NOT_OF_RTX if library == "tensorrt-rtx" else OF_RTX)
