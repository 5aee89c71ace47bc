"""Ways in which the directory of a model may be broken: each changes one thing in it."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_OTHERS = ("clip-retrained", "clip-wider", "openai", "roberta", "convnext-bert")
_PAGE = "<!doctype html><title>404</title>"
_WEIGHTS, _BIN = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True, slots=True)
class Break:
    """A way to break a directory.

    Attributes:
        name: what it does.
        change: does it, given the directory and the folder with the models of others.
    """

    name: str
    change: Callable[[Path, Path], object]


def all_breaks() -> list[Break]:
    """Every way, in an order that mixes the kinds."""
    kinds = [_files(), _settings(), _tokenizers(), _processors(), _weights()]
    lists = [list(kind) for kind in kinds]
    longest = max(map(len, lists))
    found: list[Break] = []
    for place in range(longest):
        found += [kind[place] for kind in lists if place < len(kind)]
    return found


def _files() -> Iterator[Break]:
    for name in _FILES:
        yield _file(name, "removed", Path.unlink)
        for share in (0.0, 0.5, 0.98):
            yield _file(name, f"cut to {share:.0%}", partial(_cut, share=share))
        for other in _OTHERS:
            yield Break(f"{name} of {other}", partial(_of_another, name=name, other=other))
        yield _file(name, "is a web page", partial(_write, text=_PAGE))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    yield _file(_WEIGHTS, "is a stand-in of Git LFS", partial(_write, text=pointer))
    yield Break("no tokenizer files", lambda own, _: _remove(own.glob("tokenizer*")))
    yield Break("empty directory", lambda own, _: _remove(own.iterdir()))
    yield Break("in a subfolder", _into_a_subfolder)
    yield Break("an adapter beside it", lambda own, _: _write(own / "adapter_config.json", "{}"))


def _file(name: str, what: str, change: Callable[[Path], object]) -> Break:
    return Break(f"{name} {what}", lambda own, _: change(own / name))


def _of_another(own: Path, models: Path, *, name: str, other: str) -> None:
    shutil.copy(models / other / name, own / name)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink()


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _into_a_subfolder(own: Path, models: Path) -> None:
    (own / "model").mkdir()
    for path in list(own.iterdir()):
        if path.name != "model":
            shutil.move(path, own / "model")


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _set(file: str, values: Mapping[str, Any], *parts: str) -> Break:
    """Set fields of a JSON file, or of a part of it."""

    def change(data: dict[str, Any]) -> None:
        for part in parts:
            data = data[part]
        data.update(values)

    where = ".".join(parts)
    named = ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items())
    return Break(
        f"{file}: {where} {named}".replace(":  ", ": "), lambda own, _: _edit(own / file, change)
    )


def _settings() -> Iterator[Break]:
    file = "config.json"
    shared: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("gelu", "relu", "no such function"),
        "layer_norm_eps": (1e-2,),
        "num_attention_heads": (1, 3, 0),
        "num_hidden_layers": (1, 4, 0),
        "hidden_size": (48,),
        "intermediate_size": (65,),
        "attention_dropout": (0.5,),
    }
    text = shared | {
        "eos_token_id": (49407, 2, 0, 1, None, [1, 2]),
        "pad_token_id": (0, 1, 3, None),
        "bos_token_id": (5,),
        "vocab_size": (300, 5000),
        "max_position_embeddings": (20, 77),
        "model_type": ("clip_text_model", "bert", "gpt2"),
    }
    vision = shared | {"image_size": (16, 48, 224), "patch_size": (4, 16), "num_channels": (1, 4)}
    for part, fields in (("text_config", text), ("vision_config", vision)):
        for name, values in fields.items():
            yield from (_set(file, {name: value}, part) for value in values)
        yield _file(file, f"without {part}", partial(_drop, key=part))
    for name, value in (
        ("projection_dim", 8),
        ("model_type", "siglip"),
        ("logit_scale_init_value", 9.0),
    ):
        yield _set(file, {name: value})
    yield _file(file, "without model_type", partial(_drop, key="model_type"))


def _drop(path: Path, key: str) -> None:
    _edit(path, lambda data: data.pop(key))


def _tokenizers() -> Iterator[Break]:
    file = "tokenizer_config.json"
    fields: dict[str, tuple[Any, ...]] = {
        "model_max_length": (8, 2, 10**30),
        "padding_side": ("left",),
        "truncation_side": ("left",),
        "bos_token": ("a", "no such token"),
        "eos_token": ("a", "no such token"),
        "pad_token": ("a", "no such token", None),
        "unk_token": ("a",),
        "add_prefix_space": (False,),
        "do_lower_case": (False,),
        "add_bos_token": (False,),
        "add_eos_token": (False,),
        "split_special_tokens": (True,),
        "tokenizer_class": ("CLIPTokenizer", "BertTokenizer", "NoSuchTokenizer"),
    }
    for name, values in fields.items():
        yield from (_set(file, {name: value}) for value in values)
    file = "tokenizer.json"
    for name in ("post_processor", "normalizer", "pre_tokenizer", "decoder"):
        yield _set(file, {name: None})
    cut = {"max_length": 5, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    yield _set(file, {"truncation": cut})
    yield _set(file, {"merges": []}, "model")
    yield _file(file, "with two tokens exchanged", partial(_edit, change=_exchange))
    yield _file(file, "with a token of a large id", partial(_edit, change=_large_id))
    yield _file(file, "with half of the vocabulary", partial(_edit, change=_halve))


def _exchange(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _large_id(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    vocabulary[list(vocabulary)[60]] = 10**6


def _halve(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = dict(list(vocabulary.items())[: len(vocabulary) // 2])


def _processors() -> Iterator[Break]:
    file = "preprocessor_config.json"
    fields: dict[str, tuple[Any, ...]] = {
        "do_normalize": (False, None),
        "do_rescale": (False,),
        "do_resize": (False,),
        "do_center_crop": (False,),
        "do_convert_rgb": (False,),
        "do_pad": (True,),
        "use_square_size": (True,),
        "resample": (0, 1, 2, 4),
        "rescale_factor": (1 / 127.5,),
        "size": ({"shortest_edge": 90}, {"height": 48, "width": 48}, 64, {"shortest_edge": 8}),
        "crop_size": ({"height": 16, "width": 16}, 24, {"height": 32, "width": 48}),
        "image_mean": ([0.3, 0.4, 0.5], [122.0, 117.0, 104.0], 0.5),
        "image_std": ([0.2, 0.3, 0.4], [0.0, 0.5, 0.5]),
        "image_processor_type": ("ViTImageProcessor", "SiglipImageProcessor", None),
        "default_to_square": (True,),
        "data_format": ("channels_last",),
    }
    for name, values in fields.items():
        yield from (_set(file, {name: value}) for value in values)
    yield Break("another processor_config.json", _nested)


def _nested(own: Path, models: Path) -> None:
    data = json.loads((own / "preprocessor_config.json").read_text(encoding="utf-8"))
    nested = {"image_processor": data | {"image_mean": [0.1, 0.2, 0.3]}}
    (own / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")


Tensors = dict[str, torch.Tensor]


def _tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path, Path], None]:
    def edit(own: Path, models: Path) -> None:
        weights = change(load_file(own / _WEIGHTS))
        kept = {name: value.contiguous() for name, value in weights.items()}
        save_file(kept, own / _WEIGHTS, {"format": "pt"})

    return edit


def _projection(change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Callable[..., None]:
    return _tensors(lambda weights: weights | {name: change(weights[name])})


def _weights() -> Iterator[Break]:
    for name in ("text_projection.weight", "visual_projection.weight"):
        yield Break(f"{name} is 0", _projection(torch.zeros_like, name))
        yield Break(f"{name} is NaN", _projection(lambda value: value * torch.nan, name))
        yield Break(f"{name} is turned", _projection(lambda value: value.T, name))
        yield Break(f"{name} is missing", _tensors(partial(_without, name=name)))
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        yield Break(f"names begin with {prefix}", _tensors(partial(_named, prefix=prefix)))
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        yield Break(f"weights in {kind}", _tensors(partial(_cast, kind=kind)))
    extra = {"text_model.more.weight": torch.zeros(3)}
    yield Break("a tensor too many", _tensors(lambda all_: all_ | extra))
    yield Break("a first layer only", _tensors(_first_layer))
    yield Break("bin only", lambda own, _: _as_bin(own))
    yield Break("bin of other weights beside it", _other_bin)
    yield Break("bin cut", _bin_cut)
    yield Break("shards", lambda own, _: _shards(own))
    yield Break("a shard missing", lambda own, _: _remove(_shards(own)[:1]))
    yield Break("a shard cut", lambda own, _: _cut(_shards(own)[0], 0.7))
    yield Break("a shard twice", lambda own, _: shutil.copy(*_shards(own)))
    yield Break("shards without an index", _no_index)
    yield Break("shards with Windows separators", _windows_shards)


def _without(weights: Tensors, name: str) -> Tensors:
    return {key: value for key, value in weights.items() if key != name}


def _named(weights: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def _cast(weights: Tensors, kind: torch.dtype) -> Tensors:
    return {key: value.to(kind) for key, value in weights.items()}


def _first_layer(weights: Tensors) -> Tensors:
    return {key: value for key, value in weights.items() if "layers.1." not in key}


def _as_bin(own: Path) -> None:
    torch.save(load_file(own / _WEIGHTS), own / _BIN)
    (own / _WEIGHTS).unlink()


def _bin_cut(own: Path, models: Path) -> None:
    _as_bin(own)
    _cut(own / _BIN, 0.5)


def _other_bin(own: Path, models: Path) -> None:
    torch.save({key: -value for key, value in load_file(own / _WEIGHTS).items()}, own / _BIN)


def _shards(own: Path) -> list[Path]:
    weights = load_file(own / _WEIGHTS)
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, own / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (own / f"{_WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (own / _WEIGHTS).unlink()
    return [own / shard for shard in sorted(set(index.values()))]


def _no_index(own: Path, models: Path) -> None:
    _shards(own)
    (own / f"{_WEIGHTS}.index.json").unlink()


def _windows_shards(own: Path, models: Path) -> None:
    shards = _shards(own)
    (own / "shards").mkdir()
    for shard in shards:
        shutil.move(shard, own / "shards")

    def change(data: dict[str, Any]) -> None:
        data["weight_map"] = {key: f"shards\\{name}" for key, name in data["weight_map"].items()}

    _edit(own / f"{_WEIGHTS}.index.json", change)
