"""Find the directory of a Hugging Face model, and name what lies there if it is none."""

import json
from collections.abc import Mapping
from pathlib import Path

from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.errors import ConfigError, first_line

ADAPTER_CONFIG, OPEN_CLIP_CONFIG = "adapter_config.json", "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SENTENCES = "modules.json"  # of a sentence-transformers model
# Settings, vocabularies, and what says the licence.
_SMALL = ("*.json", "*.txt", "*.model", "README.md", "LICENSE*")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers looks for them, in order
_PYTORCH = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_FOREIGN = (".onnx", ".gguf", ".h5", ".msgpack", ".tflite")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_LFS = b"version https://git-lfs"


def model_folder(source: str | Path) -> Path:
    """Return the directory of a model: `source` itself, or the hub's cache of a hub id.

    `OWNER/NAME@REVISION` is a branch, tag or commit of a hub repository; all of its files are taken
    from one commit. Of a repository without safetensors, the weights in PyTorch's format are taken.
    Of a sentence-transformers model, the directory is that of the CLIP in it.

    Raises:
        ConfigError: neither a directory here nor to be had from the hub.
    """
    folder = Path(source)
    if folder.is_dir():
        return _first_module(folder, source)
    if folder.is_file():
        raise ConfigError(
            f"{source} is a file: give the directory of a Hugging Face dual encoder, with "
            "config.json, weights, tokenizer and preprocessor_config.json"
        )
    if folder.exists() or str(source).startswith((".", "/", "~")):
        raise ConfigError(f"{source} is not a directory with a Hugging Face dual encoder")
    return _first_module(_downloaded(str(source)), source)


def _downloaded(source: str) -> Path:
    """Download a hub repository's model; first the small files, which say where weights are."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    wanted = [*_SMALL, "model*.safetensors"]
    try:
        found = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
        for patterns in _weight_patterns(found):
            if not any(any(found.glob(pattern)) for pattern in patterns):
                # The directory is named after the commit.
                more = [*_SMALL, *patterns]
                found = Path(snapshot_download(name, revision=found.name, allow_patterns=more))
            if any(any(found.glob(pattern)) for pattern in patterns):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{source} is neither a directory here nor to be had from the hub ({first_line(error)})"
        ) from error
    return found


def _weight_patterns(folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return where the weights of a repository are, by its small files, the best format first."""
    if (folder / ADAPTER_CONFIG).is_file():
        return ("adapter_model*.safetensors",), ("adapter_model*.bin",)
    if (folder / "config.json").is_file():
        return ("model*.safetensors",), ("pytorch_model*.bin",)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return tuple((name,) for name in OPEN_CLIP_WEIGHTS)
    module = _module_path(folder)
    if module is not None:
        return (f"{module}/model*.safetensors",), (f"{module}/pytorch_model*.bin",)
    return ()


def _first_module(folder: Path, source: str | Path) -> Path:
    """Return where the model lies in a sentence-transformers model, any other directory as it is.

    Raises:
        ConfigError: steps behind the model would change its embeddings.
    """
    module = _module_path(folder)
    if module is None or not (folder / module / "config.json").is_file():
        return folder
    modules = json.loads((folder / SENTENCES).read_text(encoding="utf-8"))
    kinds = [str(item.get("type", "")).rpartition(".")[2] for item in modules[1:]]
    others = [kind for kind in kinds if kind != "Normalize"]  # which all embeddings are here
    if others:
        raise ConfigError(
            f"{source}: a sentence-transformers model whose embeddings pass through "
            f"{', '.join(others)} behind the CLIP, which is not supported: the CLIP alone is "
            f"{folder / module}"
        )
    return folder / module


def _module_path(folder: Path) -> str | None:
    """Return the subfolder of a sentence-transformers model's first module; None if it has none."""
    try:
        modules = json.loads((folder / SENTENCES).read_text(encoding="utf-8"))
        path = str(modules[0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return path if path and not path.startswith((".", "/")) else None


def read_config(folder: Path, source: str | Path, families: Mapping[str, object]) -> str:
    """Return the family of the model in a directory, its `model_type`.

    Args:
        folder: the directory.
        source: how the user named it, for the messages.
        families: the `model_type` that are supported.

    Raises:
        ConfigError: a bundle, a model in another format (named, with what to do about it), or of
            another family; or weights or tokenizer files that are missing.
    """
    if (folder / MANIFEST_NAME).is_file():
        raise ConfigError(f"{source} is a bundle: give the model that it was exported from")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{source}: {_other_format(folder, source, families, 'no config.json')}")
    family = read_json(folder / "config.json").get("model_type")
    is_known = isinstance(family, str) and family in families
    if family is None or (not is_known and (folder / "modules.json").is_file()):
        found = _other_format(folder, source, families, "no model_type in config.json")
        raise ConfigError(f"{source}: {found}")
    if not is_known:
        known = ", ".join(families)
        raise ConfigError(f"{source}: model_type {family!r} is not supported; known: {known}")
    _check_weights(folder, source)
    check_tokenizer_files(folder, source)
    return str(family)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ConfigError: missing, damaged, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return data


def _other_format(
    folder: Path, source: str | Path, families: Mapping[str, object], lacks: str
) -> str:
    """Name the format of a directory without a usable config.json, and what to do about it.

    `lacks` says what is not there.
    """
    names = sorted(path.name for path in folder.iterdir())
    within = _model_within(folder, source, families)
    if any(name.startswith("open_clip") for name in names):
        return (
            f"an OpenCLIP checkpoint without its {OPEN_CLIP_CONFIG}, so its architecture is "
            "unknown: bring that file too"
        )
    if {"modules.json", "config_sentence_transformers.json"} & set(names):
        if within:
            return f"a sentence-transformers model: give the CLIP in it, {within}"
        return (
            "a sentence-transformers model without a CLIP of transformers in it: give a model with "
            f"an image and a text tower ({', '.join(families)})"
        )
    if "model_index.json" in names:
        return (
            "a diffusers pipeline, whose text encoder has no image tower: give the whole CLIP that "
            "it came from"
        )
    if within:
        return f"{lacks}, but a model lies in a subfolder: give {within}"
    if "architecture" in _loose_json(folder / "config.json"):
        return "a timm model, which has no text tower: give a CLIP of transformers"
    foreign = [name for name in names if name.endswith(_FOREIGN)]
    if foreign:
        return f"{lacks}, but {foreign[0]}: give the model of transformers that it was made from"
    if any(name.endswith(_PYTORCH) for name in names):
        return (
            f"weights, but {lacks}, so their architecture is unknown: save the model with "
            "`save_pretrained`, or bring the config.json that belongs to them"
        )
    return f"{lacks}, so it is no Hugging Face model"


def _model_within(folder: Path, source: str | Path, families: Mapping[str, object]) -> str | None:
    """Say where a model lies in a subfolder; None if none does."""
    configs = sorted((*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))
    found = [
        path.parent for path in configs if str(_loose_json(path).get("model_type")) in families
    ]
    if not found or Path(source).is_dir():
        return str(found[0]) if found else None
    # Of a hub repository only the small files are here.
    part = found[0].relative_to(folder).as_posix()
    return f"DIR/{part} after `hf download {source} --local-dir DIR`"


def _loose_json(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except ConfigError:
        return {}


def _check_weights(folder: Path, source: str | Path) -> None:
    """Refuse weights that are missing, named otherwise, or stand-ins of Git LFS."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return check_weight_file(folder / name, source)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _check_shards(index, source)
    suffixes = (*_PYTORCH, *_FOREIGN)
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(suffixes))
    holds = f"; it holds {', '.join(others[:3])}" if others else ""
    raise ConfigError(
        f"{source} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
        f"of shards{holds}. Save the model with `save_pretrained`, or download it whole"
    )


def _check_shards(index: Path, source: str | Path) -> None:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ConfigError(f"{index} has no weight_map: download it again")
    names = sorted(set(map(str, shards.values())))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} of the {len(names)} files with weights that "
            f"{index.name} names, such as {missing[0]}: download the model again"
        )
    for name in names:
        check_weight_file(index.parent / name, source)


def check_weight_file(path: Path, source: str | Path) -> None:
    """Refuse a file of weights that is empty, cut short or a stand-in of Git LFS.

    Raises:
        ConfigError: it is, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if start == _LFS:
        raise ConfigError(
            f"{path} is a stand-in of Git LFS, without the weights: run `git lfs pull` there"
        )
    if not start:
        raise ConfigError(f"{source} cannot be loaded: {path.name} is empty; download it again")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is damaged or cut short ({first_line(error)}): download it again"
            ) from error


def check_tokenizer_files(folder: Path, source: str | Path) -> None:
    """Refuse a directory without a vocabulary: transformers would invent one of a few tokens.

    Raises:
        ConfigError: there is none, or a file of settings or tokens is damaged.
    """
    names = {path.name for path in folder.iterdir()}
    for name in sorted(names.intersection(_TOKENIZER_FILES)):
        read_json(folder / name)
    split = {"vocab.json", "merges.txt"}  # of byte-pair encoding: neither is enough alone
    whole = "tokenizer.json" in names or "vocab.txt" in names or split <= names
    if whole or any(name.endswith((".model", ".tiktoken")) for name in names):
        return
    has = sorted(split & names)
    raise ConfigError(
        f"{source} has no vocabulary: {f'{has[0]} alone is not enough' if has else 'no file of it'}"
        "; bring tokenizer.json (or vocab.json and merges.txt, or vocab.txt) of the model, with "
        "its tokenizer_config.json"
    )
