"""The same ONNX files read by others: are their embeddings those of EdgeCLIP's runtime?

ONNX Runtime, OpenVINO, transformers.js and optimum's classes each read the fp32 towers of three
models in a process of their own. They get the very arrays that EdgeCLIP's runtime got ("same",
held to the bar), or the captions and the PNG files, for which they use their own tokenizer
and image processor. Those are held to the bar too, but where pictures have to be resized or
captions cut, the difference is only told: then the graph is not to blame.

transformers.js and optimum are installed in build/consumers; `--quick` leaves them out.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bars import Bar, Rule, finish, hold, options, say
from _processes import BUILD, UnavailableError, environment, install_once, run_to_end
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.pretrain import train_tokenizer
from edgeclip.export.graph.to_onnx import export_towers
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.inputs.preprocess import preprocess_batch
from edgeclip.runtime.spec import ImageSpec

BARS: dict[str, Rule] = {
    "consumers_run": (">=", None, ""),  # all that are there: 5, and 2 with --quick
    "inputs_not_read": ("<=", 0, ""),
    "*_*": ("<=", 1e-3, ""),  # of a value of an embedding, for each consumer and input
}
KEPT_MODELS = ("compress/emoji_teacher",)

HERE = Path(__file__).parent / "consumers"
REQUIREMENTS = {
    # It asks for a transformers that has known vulnerabilities: never install it elsewhere.
    "optimum-onnx": ("optimum-onnx[onnxruntime]==0.1.0", "pillow"),
    "optimum-intel": ("optimum-intel[openvino]==2.2.0", "pillow"),
}
_TORCH = f"torch=={version('torch').split('+')[0]}"
PRESENT = ("onnxruntime", "openvino")
INSTALLED = ("transformers.js", *REQUIREMENTS)
# What is held to the bar, by tower and kind of input, and what it is called there.
HELD = {
    ("image", "same"): "image",
    ("image", "own, no resizing"): "png",
    ("text", "same"): "text",
    ("text", "own"): "captions",
}
# Told but not held to the bar: on some processors OpenVINO computes in bfloat16 by default.
_FREE = "default precision"
_SECONDS = 600
_SIZES = ((240, 240), (240, 180), (150, 240), (64, 64), (48, 48), (37, 29))  # px, wide and high
_AWKWARD = ("RED Apple", "café, 3 stars!", "two  spaces and\ta tab", "", "☕ über 東京", "a-b_c's")
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One class of one consumer on one tower of one model.

    `given` are the `same` arrays as EdgeCLIP's runtime, or captions or pictures, for which the
    consumer uses its `own` preprocessing; `max_abs` and the mean and largest of `pixel_levels`,
    of 255, are differences.
    """

    consumer: str
    version: str
    reader: str
    model: str
    tower: str
    given: str
    max_abs: float | None = None
    min_cosine: float | None = None
    same_ids: bool | None = None
    pixel_levels: tuple[float, float] | None = None
    why: str = ""

    @property
    def held(self) -> bool:
        """Whether the bar is for this row."""
        return (self.tower, self.given) in HELD and _FREE not in self.reader


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One model, its inputs in `folder`, and the embeddings that EdgeCLIP's runtime gives.

    `embeddings` are float32 [N, dim] by tower and kind of input, `pixels` float32
    [N, 3, size, size] by kind; `torch` is what the model gave before it was exported, by tower.
    """

    folder: Path
    std: tuple[float, ...]
    ids: list[list[int]]
    pixels: dict[str, FloatArray]
    embeddings: dict[tuple[str, str], FloatArray]
    torch: dict[str, FloatArray]


def write_case(dual: DualEncoder, folder: Path) -> Case:
    """Export a model, and write its inputs: model/, given.json and pictures."""
    model, spec = folder / "model", dual.image_spec
    model.mkdir(parents=True)
    paths = export_towers(dual, model)
    dual.save_settings(model)
    fit = 3 * ((spec.resize, spec.resize),)
    images = {"own": pictures(folder, "any", _SIZES)}
    images["own, no resizing"] = pictures(folder, "fit", fit)
    captions = {"own": [*scene_captions("test", 6), *_AWKWARD]}
    captions["too long"] = [" and ".join([*scene_captions("test", 12), *_AWKWARD])]
    pixels = {
        kind: preprocess_batch([folder / name for name in names], spec)
        for kind, names in images.items()
    }
    ids = {kind: dual.text_tokenizer.encode(some, truncate=True) for kind, some in captions.items()}
    values, tokens = pixels["own"], ids["own"]
    given = {
        "images": images,
        "captions": captions,
        "size": spec.size,
        "pixel_values": values.ravel().tolist(),
        "input_ids": tokens.tolist(),
    }
    (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
    with torch.inference_mode():
        by_torch = {"image": dual.embed_image(torch.from_numpy(values)).numpy()}
        by_torch["text"] = dual.embed_text(torch.from_numpy(tokens)).numpy()
    embeddings = embed("image", paths.image, "pixel_values", pixels)
    embeddings |= embed("text", paths.text, "input_ids", ids)
    return Case(folder, spec.std, tokens.tolist(), pixels, embeddings, by_torch)


def embed(
    tower: str, path: Path, name: str, inputs: Mapping[str, NDArray[Any]]
) -> dict[tuple[str, str], FloatArray]:
    """What EdgeCLIP's runtime gives for each kind of input; `same` is what was made of `own`."""
    engine, found = open_engine(path, device=load_device("this-machine")), {}
    for kind, values in inputs.items():
        (found[tower, kind],) = engine.run({name: values}).values()
    return found | {(tower, "same"): found[tower, "own"]}


def pictures(folder: Path, stem: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Scenes of the given widths and heights, as PNG files."""
    source = EmojiSource("test", len(sizes), size=240)
    names = []
    for index, (width, height) in enumerate(sizes):
        side = max(width, height)
        left, upper = (side - width) // 2, (side - height) // 2
        scene = source.picture(index, size=side)
        names.append(f"{stem}{index}.png")
        scene.crop((left, upper, left + width, upper + height)).save(folder / names[-1])
    return names


def scene_captions(split: Any, count: int) -> list[str]:
    return [*map(EmojiSource(split, count, size=64).caption, range(count))]


def openai_layout() -> DualEncoder:
    """A small random CLIP as OpenAI's are stored: padded with the end mark, eos_token_id 2."""
    tokenizer = openai_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 32}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    config = CLIPConfig(
        projection_dim=32,
        vision_config={"image_size": 48, "patch_size": 16, **shape},
        text_config={**words, **special, **shape},
    )
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    torch.manual_seed(0)
    image = ImageSpec(size=48, resize=48, mean=mean, std=std)
    return DualEncoder(stirred(CLIPModel(config)), image, tokenizer)


def openai_tokenizer() -> CLIPTokenizer:
    """Every byte within a word and at its end, then what is merged, then the two marks."""
    backend = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[]).backend_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=[_START, _END],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(scene_captions("train", 300), trainer)
    # Any: transformers wants tuples, but says strings.
    pairs: Any = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


def convnext_bert() -> DualEncoder:
    """A small random ConvNext beside a BERT: no part of it is CLIP's."""
    captions = scene_captions("train", 300)
    tokenizer = train_tokenizer(iter(captions), vocab_size=600, context_length=40)
    vision = ConvNextConfig(depths=[1, 1], hidden_sizes=[32, 64], num_stages=2, image_size=64)
    vision.hidden_size = 64  # the projection reads its width there
    shape: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 256, "max_position_embeddings": 40}
    pad = tokenizer.pad_token_id
    text = BertConfig(vocab_size=len(tokenizer), pad_token_id=pad, **shape)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=32)
    torch.manual_seed(0)
    model = VisionTextDualEncoderModel(
        config, vision_model=ConvNextModel(vision), text_model=BertModel(text)
    )
    half = (0.5, 0.5, 0.5)
    image = ImageSpec(size=64, resize=72, mean=half, std=half, resample="bilinear")
    return DualEncoder(stirred(model), image, tokenizer)


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Weights all unlike each other, norms and biases included, so that none can be mistaken."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 0:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    return model


MODELS: dict[str, Callable[[], DualEncoder]] = {
    "emoji-teacher": lambda: DualEncoder.load(BUILT_IN_TEACHER),
    "openai-layout": openai_layout,
    "convnext-bert": convnext_bert,
}


def command_of(consumer: str) -> list[str]:
    """Install a consumer if need be; the command that reads cases with it."""
    if consumer == "transformers.js":
        return node_command()
    python = Path(sys.executable)
    if consumer in REQUIREMENTS:
        python = environment(f"consumers/{consumer}", [*REQUIREMENTS[consumer], _TORCH])
        drop_unfit_torchvision(python)
    return [str(python), str(HERE / "run_towers.py"), consumer]


def node_command() -> list[str]:
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(f"{' and '.join(missing)} not found: install Node.js 18 or later")
    folder, package = BUILD / "consumers" / "npm", "@huggingface/transformers@4.3.1"
    # onnxruntime-node's script would only fetch CUDA: the CPU's library is in the package.
    quiet = ("--no-audit", "--no-fund", "--loglevel=error")
    npm = ["npm", "install", "--ignore-scripts", *quiet, "--prefix", str(folder), package]
    install_once(folder, package, lambda: run_to_end(npm, folder))
    shutil.copy(HERE / "run.mjs", folder)  # node looks for packages beside the script
    return ["node", str(folder / "run.mjs")]


def drop_unfit_torchvision(python: Path) -> None:
    """PyPI's fits PyPI's torch alone; transformers does without, but not with a bad one."""
    probe = "import importlib.util as u; u.find_spec('torchvision') and __import__('torchvision')"
    if subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode:
        say("removing torchvision, which was built for another torch")
        run_to_end([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])


def rows_of(consumer: str, cases: Mapping[str, Case], root: Path) -> Iterator[Row]:
    """Hold what a consumer says of all cases against EdgeCLIP's runtime."""
    out = root.parent / f"{consumer}.json"
    command = [*command_of(consumer), str(root), str(out)]
    run_to_end(command, seconds=_SECONDS, variables={"HF_HUB_OFFLINE": "1"})
    found = json.loads(out.read_text(encoding="utf-8"))
    for item in found["rows"]:
        case = cases[item["model"]]
        row: dict[str, Any] = {key: item[key] for key in ("reader", "model", "tower", "given")}
        row["why"] = item["why"].replace(f"{case.folder}{os.sep}", "")
        if item["embeddings"] is not None:
            got = np.array(item["embeddings"], np.float32)
            row |= difference(got, case.embeddings[item["tower"], item["given"]])
        if item["ids"] is not None and item["given"] == "own":
            row["same_ids"] = item["ids"] == case.ids
        if item["pixels"] is not None:
            wanted = case.pixels[item["given"]]
            got = np.array(item["pixels"], np.float32).reshape(wanted.shape)
            std = np.array(case.std, np.float32).reshape(3, 1, 1)
            levels = np.abs(got - wanted) * std * 255
            row["pixel_levels"] = (float(levels.mean()), float(levels.max()))
        yield Row(consumer=consumer, version=found["version"], **row)


def torch_rows(cases: Mapping[str, Case]) -> Iterator[Row]:
    for name, case in cases.items():
        for tower, got in case.torch.items():
            row = difference(got, case.embeddings[tower, "same"])
            row |= {"reader": "DualEncoder", "model": name, "tower": tower, "given": "same"}
            yield Row(consumer="torch", version=torch.__version__, **row)


def difference(got: FloatArray, wanted: FloatArray) -> dict[str, Any]:
    if got.shape != wanted.shape:
        raise ValueError(f"embeddings of shape {got.shape} in place of {wanted.shape}")
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines = (got * wanted).sum(axis=1) / lengths
    return {"max_abs": float(np.abs(got - wanted).max()), "min_cosine": float(cosines.min())}


def table(rows: Iterable[Row]) -> str:
    """One line for each consumer, class, tower and kind of input, over all models."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (f"{row.consumer} {row.version}", row.reader, row.tower, row.given)
        lines.setdefault(key, []).append(row)
    cells = [("consumer", "class", "tower", "input", "max abs difference")]
    for (consumer, reader, tower, given), several in lines.items():
        ran = [row.max_abs for row in several if row.max_abs is not None]
        failed = [f"{row.model} not run: {row.why}" for row in several if row.max_abs is None]
        told = "; ".join([f"{max(ran):.2e}", *failed]) if ran else f"not run: {several[0].why}"
        cells.append((consumer, reader, tower, given, told))
    return columns(cells, left=5)


def bars(rows: Sequence[Row], expected: Sequence[str]) -> list[Bar]:
    """The largest difference for each consumer and input, how many consumers ran, and on all?"""
    held = [row for row in rows if row.held]
    worst: dict[str, float] = {}
    for row in held:
        if row.max_abs is not None:
            name = f"{row.consumer}_{HELD[row.tower, row.given]}"
            worst[name] = max(worst.get(name, 0.0), row.max_abs)
    both = [name for name in expected if {f"{name}_image", f"{name}_text"} <= set(worst)]
    # A class that reads one tower is meant for such files, and must read those of all models.
    fit = {(row.consumer, row.reader) for row in held if row.max_abs is not None}
    failed = sum(row.max_abs is None and (row.consumer, row.reader) in fit for row in held)
    return [
        *(hold(BARS, name, value) for name, value in worst.items()),
        hold(BARS, "consumers_run", len(both), len(expected)),
        hold(BARS, "inputs_not_read", failed),
    ]


def main() -> int:
    args = options(__doc__).parse_args()
    expected = PRESENT if args.quick else (*PRESENT, *INSTALLED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cases"
        cases = {name: write_case(make(), root / name) for name, make in MODELS.items()}
        rows, absent = list(torch_rows(cases)), []
        for consumer in expected:
            try:
                rows += rows_of(consumer, cases, root)
            except UnavailableError as error:
                absent.append(f"{consumer}  not run: {error}")
    print("\n".join([table(rows), *absent]))
    return finish(bars(rows, expected), args.out, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
