"""Read the towers of each case with one Python consumer, in an environment that has it.

    python run_towers.py CONSUMER CASES OUT.json

CASES holds folders with given.json and model/; OUT.json gets one row for each class, tower
and kind of input, with the embeddings or the reason why there are none. Nothing of EdgeCLIP
is imported: this is what somebody without it would write.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Run = Callable[[Array], Array]
Load = Callable[[Path, str], Run]

GRAPHS = {"image": "vision_model.onnx", "text": "text_model.onnx"}
INPUTS = {"image": "pixel_values", "text": "input_ids"}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def with_onnxruntime(model: Path, tower: str) -> Run:
    """A plain session."""
    import onnxruntime

    path = str(model / "onnx" / GRAPHS[tower])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda values: np.asarray(session.run([OUTPUTS[tower]], {INPUTS[tower]: values})[0])


def with_openvino(how: str, config: dict[str, str]) -> Load:
    """`Core.read_model` or `convert_model`, on the CPU."""

    def load(model: Path, tower: str) -> Run:
        import openvino

        path = model / "onnx" / GRAPHS[tower]
        core = openvino.Core()
        graph = openvino.convert_model(path) if how == "convert_model" else core.read_model(path)
        compiled = core.compile_model(graph, "CPU", config)
        return lambda values: np.asarray(compiled({INPUTS[tower]: values})[OUTPUTS[tower]])

    return load


def with_optimum(module: str, name: str, **options: Any) -> Load:
    """A model class of optimum, given the folder and the tower's file."""

    def load(model: Path, tower: str) -> Run:
        import importlib

        cls = getattr(importlib.import_module(module), name)
        loaded = cls.from_pretrained(model, subfolder="onnx", file_name=GRAPHS[tower], **options)
        return lambda values: np.asarray(loaded(**{INPUTS[tower]: values})[OUTPUTS[tower]])

    return load


def _optimum(module: str, prefix: str, **options: Any) -> dict[str, Load]:
    kinds = ("CustomTasks", "FeatureExtraction", "ZeroShotImageClassification")
    names = [f"{prefix}ModelFor{kind}" for kind in (*kinds, "ImageClassification")]
    return {name: with_optimum(module, name, **options) for name in names}


_INTEL = {"from_onnx": True, "ov_config": F32}
READERS: dict[str, dict[str, Load]] = {
    "onnxruntime": {"InferenceSession": with_onnxruntime},
    "openvino": {
        "read_model": with_openvino("read_model", F32),
        "convert_model": with_openvino("convert_model", F32),
        "read_model, default precision": with_openvino("read_model", {}),
    },
    "optimum-onnx": _optimum("optimum.onnxruntime", "ORT", local_files_only=True),
    "optimum-intel": {
        **_optimum("optimum.intel", "OV", **_INTEL),
        "OVModelOpenCLIPText": with_optimum("optimum.intel", "OVModelOpenCLIPText", **_INTEL),
        "OVModelOpenCLIPVisual": with_optimum("optimum.intel", "OVModelOpenCLIPVisual", **_INTEL),
    },
}
# Why a class of optimum does not fit a folder with two towers; its own words come behind.
NEEDS = {
    "FeatureExtraction": "gives nothing but an output called last_hidden_state",
    "ZeroShotImageClassification": "needs one graph with both towers and their logits",
    "ImageClassification": "gives nothing but an output called logits",
    "OpenCLIPText": "reads files of open_clip, whose graphs map text to text_features",
    "OpenCLIPVisual": "reads files of open_clip, whose graphs map x to image_features",
}
OWN = {"ORTModelForCustomTasks", "OVModelForCustomTasks"}  # these come with transformers
OWN_KINDS = (
    *(("image", "own"), ("image", "own, no resizing")),
    *(("text", "own"), ("text", "too long")),
)


def own_inputs(given: dict[str, Any], folder: Path, tower: str, kind: str) -> Array:
    """What this environment's transformers makes of the captions or the pictures."""
    from transformers import AutoTokenizer, CLIPImageProcessor

    model = folder / "model"
    if tower == "image":
        from PIL import Image

        pictures = [Image.open(folder / name) for name in given["images"][kind]]
        processor: Any = CLIPImageProcessor.from_pretrained(model)
        return np.asarray(processor(pictures, return_tensors="np")["pixel_values"], np.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    captions = given["captions"][kind]
    made = tokenizer(captions, padding=True, truncation=True, return_tensors="np")
    return np.asarray(made["input_ids"], np.int64)


def same_inputs(given: dict[str, Any], tower: str) -> Array:
    """The arrays that EdgeCLIP's own runtime was given."""
    if tower == "text":
        return np.array(given["input_ids"], np.int64)
    size = given["size"]
    return np.array(given["pixel_values"], np.float32).reshape(-1, 3, size, size)


def row(load: Load, reader: str, tower: str, kind: str, folder: Path) -> dict[str, Any]:
    """Run one class on one kind of input; a failure becomes its reason."""
    found: dict[str, Any] = {"embeddings": None, "ids": None, "pixels": None, "why": ""}
    given = json.loads((folder / "given.json").read_text(encoding="utf-8"))
    try:
        if kind == "same":
            values = same_inputs(given, tower)
        else:
            values = own_inputs(given, folder, tower, kind)
            made = "pixels" if tower == "image" else "ids"
            found[made] = values.ravel().tolist() if tower == "image" else values.tolist()
        found["embeddings"] = load(folder / "model", tower)(values).tolist()
    except Exception as error:  # whatever the consumer raises is the answer
        need = next((text for end, text in NEEDS.items() if reader.endswith(end)), "")
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        found["why"] = f"{need} ({said})" if need else said
    return {"model": folder.name, "reader": reader, "tower": tower, "given": kind, **found}


def main() -> None:
    """All readers of one consumer, over all cases."""
    consumer, cases, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = []
    for folder in sorted(cases.iterdir()):
        for reader, load in READERS[consumer].items():
            rows += [row(load, reader, tower, "same", folder) for tower in ("image", "text")]
            if reader in OWN:
                rows += [row(load, reader, tower, kind, folder) for tower, kind in OWN_KINDS]
    record = {"version": version(consumer), "rows": rows}
    out.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
