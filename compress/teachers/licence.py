"""Read the licence of a model's weights, and tell whether it keeps others from using a student."""

import re
from pathlib import Path

import yaml

from edgeclip.compress.teachers.model_folder import SENTENCES

_LARGEST = 1 << 20  # bytes of a model card
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
# Weights that are for research or non-commercial use only, and are often copied without their
# card. Sources: the model cards of apple/MobileCLIP2-S4, facebook/metaclip-h14-fullcc2.5b,
# facebook/EUPE-ViT-B and jinaai/jina-clip-v2.
_KNOWN = {
    "mobileclip": "apple-amlr",
    "metaclip": "cc-by-nc-4.0",
    "eupe": "fair-noncommercial-research-license",
    "jina-clip-v2": "cc-by-nc-4.0",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.@-]+")
_RESTRICTED = re.compile(
    # apple-ascl is what the cards of the first MobileCLIPs call their research licence.
    r"(?:^|[^a-z])(?:nc|amlr|ascl|non-?commercial|research)(?:[^a-z]|$)",
    re.IGNORECASE,
)
_TEXTS = {  # the first words of a LICENSE file
    "apache license": "apache-2.0",
    "mit license": "mit",
}


def read_licence(folder: Path, source: str | Path) -> str | None:
    """Return the licence of the weights in a directory; None if nothing there tells it.

    It is that of the model card's front matter, else of a LICENSE file that is known, else of
    weights whose name is that of a family which is not free. Never raises.

    Args:
        folder: the directory of the model.
        source: how the user named it.
    """
    folders = [folder]
    if (folder.parent / SENTENCES).is_file():  # the card of a sentence-transformers model
        folders.append(folder.parent)
    told = (read(place) for read in (_of_card, _of_text) for place in folders)
    return next((licence for licence in told if licence), None) or _of_name(str(source))


def _of_card(folder: Path) -> str | None:
    """Read `license`, or `license_name` where that is "other"."""
    found = _FRONT_MATTER.match(_text(folder / "README.md"))
    if found is None:
        return None
    try:
        card = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return None
    if not isinstance(card, dict):
        return None
    names = card.get("license"), card.get("license_name")
    given = [item[0] if isinstance(item, list) and item else item for item in names]
    words = [str(item).strip() for item in given if item]
    if len(words) > 1 and words[0].casefold() == "other":
        return words[1]
    return words[0] if words else None


def _of_text(folder: Path) -> str | None:
    start = _text(folder / "LICENSE").lstrip()[:100].casefold()
    return next((name for words, name in _TEXTS.items() if start.startswith(words)), None)


def _of_name(source: str) -> str | None:
    name = source.casefold().rstrip("/")
    if not _HUB_ID.fullmatch(name):
        name = name.rpartition("/")[2]  # the folders around a directory tell nothing
    return next((licence for word, licence in _KNOWN.items() if word in name), None)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def is_restricted(licence: str) -> bool:
    """Tell whether a licence allows research or non-commercial use only, by its name."""
    return _RESTRICTED.search(licence) is not None


def joined(one: str | None, other: str | None) -> str | None:
    """Return the licence of weights that come from two models."""
    if one is None or other is None or one.casefold() == other.casefold():
        return one or other
    return f"{one} AND {other}"
