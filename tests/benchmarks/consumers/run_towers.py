"""Read the towers of each case with one Python consumer, in an environment that has it.

    python run_towers.py CONSUMER CASES OUT.json

CASES holds folders with given.json and model/; OUT.json gets one row for each class, tower
and kind of input, with the embeddings or the reason why there are none. Nothing of EdgeCLIP
is imported: this is what somebody without it would write.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
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
    onnxruntime: Any = importlib.import_module("onnxruntime")
    path, cpu = str(model / "onnx" / GRAPHS[tower]), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, providers=cpu)
    return lambda values: np.asarray(session.run([OUTPUTS[tower]], {INPUTS[tower]: values})[0])


def with_openvino(how: str, config: dict[str, str]) -> Load:
    """`Core.read_model` or `convert_model`, on the CPU."""

    def load(model: Path, tower: str) -> Run:
        openvino: Any = importlib.import_module("openvino")
        path, core = model / "onnx" / GRAPHS[tower], openvino.Core()
        graph = openvino.convert_model(path) if how == "convert_model" else core.read_model(path)
        compiled = core.compile_model(graph, "CPU", config)
        return lambda values: np.asarray(compiled({INPUTS[tower]: values})[OUTPUTS[tower]])

    return load


def with_optimum(module: str, *names: str, **options: Any) -> dict[str, Load]:
    """Model classes of optimum, given the folder and the tower's file."""

    def loader(name: str) -> Load:
        def load(model: Path, tower: str) -> Run:
            cls = getattr(importlib.import_module(module), name)
            file = GRAPHS[tower]
            loaded = cls.from_pretrained(model, subfolder="onnx", file_name=file, **options)
            return lambda values: np.asarray(loaded(**{INPUTS[tower]: values})[OUTPUTS[tower]])

        return load

    return {name: loader(name) for name in names}


# Why a class of optimum does not fit a folder with two towers; its own words come behind.
NEEDS = {
    "CustomTasks": "",
    "FeatureExtraction": "gives nothing but an output called last_hidden_state",
    "ZeroShotImageClassification": "needs one graph with both towers and their logits",
    "ImageClassification": "gives nothing but an output called logits",
}
OPEN_CLIP_NEEDS = {
    "OVModelOpenCLIPText": "reads files of open_clip, whose graphs map text to text_features",
    "OVModelOpenCLIPVisual": "reads files of open_clip, whose graphs map x to image_features",
}
READERS: dict[str, dict[str, Load]] = {
    "onnxruntime": {"InferenceSession": with_onnxruntime},
    "openvino": {
        "read_model": with_openvino("read_model", F32),
        "convert_model": with_openvino("convert_model", F32),
        "read_model, default precision": with_openvino("read_model", {}),
    },
    "optimum-onnx": with_optimum(
        "optimum.onnxruntime", *(f"ORTModelFor{kind}" for kind in NEEDS), local_files_only=True
    ),
    "optimum-intel": with_optimum(
        "optimum.intel",
        *(f"OVModelFor{kind}" for kind in NEEDS),
        *OPEN_CLIP_NEEDS,
        from_onnx=True,
        ov_config=F32,
    ),
}
OWN = {"ORTModelForCustomTasks", "OVModelForCustomTasks"}  # these come with transformers
SAME_KINDS = (("image", "same"), ("text", "same"))
OWN_KINDS = (
    *(("image", "own"), ("image", "own, no resizing")),
    *(("text", "own"), ("text", "too long")),
)


def inputs(given: dict[str, Any], folder: Path, tower: str, kind: str) -> Array:
    """EdgeCLIP's own arrays, or what this environment's transformers makes of the inputs."""
    if kind == "same" and tower == "text":
        return np.array(given["input_ids"], np.int64)
    if kind == "same":
        size = given["size"]
        return np.array(given["pixel_values"], np.float32).reshape(-1, 3, size, size)
    transformers: Any = importlib.import_module("transformers")
    if tower == "image":
        image: Any = importlib.import_module("PIL.Image")
        pictures = [image.open(folder / name) for name in given["images"][kind]]
        processor = transformers.CLIPImageProcessor.from_pretrained(folder / "model")
        return np.asarray(processor(pictures, return_tensors="np")["pixel_values"], np.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    captions = given["captions"][kind]
    made = tokenizer(captions, padding=True, truncation=True, return_tensors="np")
    return np.asarray(made["input_ids"], np.int64)


def row(load: Load, reader: str, tower: str, kind: str, folder: Path) -> dict[str, Any]:
    """Run one class on one kind of input; a failure becomes its reason."""
    found: dict[str, Any] = {"embeddings": None, "ids": None, "pixels": None, "why": ""}
    try:
        given = json.loads((folder / "given.json").read_text(encoding="utf-8"))
        values = inputs(given, folder, tower, kind)
        if kind != "same":
            made = {"image": ("pixels", values.ravel()), "text": ("ids", values)}[tower]
            found[made[0]] = made[1].tolist()
        found["embeddings"] = load(folder / "model", tower)(values).tolist()
    except Exception as error:  # whatever the consumer raises is the answer
        needs = (NEEDS | OPEN_CLIP_NEEDS).items()
        need = next((text for end, text in needs if reader.endswith(end)), "")
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        found["why"] = f"{need} ({said})" if need else said
    return {"model": folder.name, "reader": reader, "tower": tower, "given": kind, **found}


def rows(consumer: str, cases: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted(cases.iterdir()):
        for reader, load in READERS[consumer].items():
            for tower, kind in (*SAME_KINDS, *(OWN_KINDS if reader in OWN else ())):
                yield row(load, reader, tower, kind, folder)


if __name__ == "__main__":
    consumer, cases, out = sys.argv[1:]
    record = {"version": version(consumer), "rows": [*rows(consumer, Path(cases))]}
    Path(out).write_text(json.dumps(record), encoding="utf-8")
