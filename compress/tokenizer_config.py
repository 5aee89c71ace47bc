"""A tokenizer's settings as every release of transformers, and transformers.js, reads them."""

import json
from pathlib import Path

# Of the process that saved them, not of the tokenizer.
_PRIVATE = ("backend", "is_local", "local_files_only")


def write_portable_config(folder: Path) -> None:
    """Rewrite `tokenizer_config.json`, beside `tokenizer.json`, so that transformers 4 reads it.

    transformers 5 calls a tokenizer without a class of its own "TokenizersBackend", a name
    that older releases and optimum's runtimes do not know; they call it
    "PreTrainedTokenizerFast". That class takes `add_prefix_space` from the settings, where
    the new one leaves it to `tokenizer.json`.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in _PRIVATE:
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        prefix = (tokenizer.get("pre_tokenizer") or {}).get("add_prefix_space")
        if prefix is not None:
            config["add_prefix_space"] = prefix
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
