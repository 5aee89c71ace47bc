"""Captions of the built-in scenes in other languages, word by word: emoji have Unicode's names."""

import functools
from dataclasses import dataclass

from edgeclip.compress.data.emoji_scenes import BACKGROUNDS, Scene, vocabulary


@dataclass(frozen=True, slots=True)
class _Language:
    """What a caption is made of, by the English words."""

    sizes: dict[str, str]
    phrases: dict[str, str]
    background: str
    colours: dict[str, str]


def _phrases(left: str, right: str, above: str, below: str, both: str) -> dict[str, str]:
    words = {"left of": left, "right of": right, "above": above, "below": below}
    return {"{0}": "{0}"} | {
        f"{{0}} {english} {end}": f"{{0}} {word} {end.replace('and', both)}"
        for english, word in words.items()
        for end in ("{1}", "{1} and {2}")
    }


def _colours(words: str) -> dict[str, str]:
    """Return the words of the colours, in the order of `BACKGROUNDS`."""
    return dict(zip(BACKGROUNDS, words.split(), strict=True))


_LANGUAGES = {
    "de": _Language(
        {"small ": "{} in klein", "": "{}", "large ": "{} in groß"},
        _phrases("links von", "rechts von", "über", "unter", "und"),
        "{phrase} auf {colour} Hintergrund",
        _colours(
            "weißem grauem schwarzem rotem orangem gelbem grünem türkisem blauem lila rosa braunem"
        ),
    ),
    "fr": _Language(
        {"small ": "{} en petit", "": "{}", "large ": "{} en grand"},
        _phrases("à gauche de", "à droite de", "au-dessus de", "au-dessous de", "et"),
        "{phrase} sur fond {colour}",
        _colours("blanc gris noir rouge orange jaune vert turquoise bleu violet rose marron"),
    ),
    "es": _Language(
        {"small ": "{} en pequeño", "": "{}", "large ": "{} en grande"},
        _phrases("a la izquierda de", "a la derecha de", "encima de", "debajo de", "y"),
        "{phrase} sobre fondo {colour}",
        _colours("blanco gris negro rojo naranja amarillo verde turquesa azul morado rosa marrón"),
    ),
}
LANGUAGES = tuple(_LANGUAGES)


@functools.cache
def _names(language: str) -> tuple[str, ...]:
    """Return the name of each emoji of `vocabulary()`; the English one where there is none."""
    import emoji

    emoji.config.load_language(language)
    found = []
    for item in vocabulary():
        label = emoji.EMOJI_DATA[item.text].get(language)
        found.append(label.strip(":").replace("_", " ") if label else item.name)
    return tuple(found)


def translate_caption(scene: Scene, language: str) -> str:
    """Say the caption of a scene in another language, one of `LANGUAGES`."""
    words, names = _LANGUAGES[language], _names(language)
    named = [
        words.sizes[size].format(names[placed.emoji])
        for size, placed in zip(scene.sizes, scene.objects, strict=True)
    ]
    phrase = words.phrases[scene.phrase].format(*named)
    return words.background.format(phrase=phrase, colour=words.colours[scene.background])
