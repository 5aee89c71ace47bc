"""`edgeclip scenes`: draw some of the built-in scenes into a folder, with captions.csv.

Translations of the captions are written to translations.csv beside it, as `distill` reads them.
"""

import argparse
import csv
import hashlib
from pathlib import Path
from typing import get_args

from edgeclip.compress.data.emoji_scenes import EmojiScenes, Split
from edgeclip.compress.data.scene_languages import LANGUAGES, translate_caption
from edgeclip.compress.data.translations import COLUMNS, TRANSLATIONS_NAME
from edgeclip.runtime.bundle.files import atomic_directory, sha256_file
from edgeclip.runtime.cli.options import Targets, zero_or_more
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import TABLE_NAME

# Only this command writes it: captions.csv is in people's own folders too.
_MARKER = ".edgeclip-scenes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, help="the folder to write")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--count", type=int, default=100, help="number of scenes (default: 100)")
    parser.add_argument("--size", type=int, default=192, help="side in pixels (default: 192)")
    parser.add_argument("--seed", type=zero_or_more, default=0)
    parser.add_argument(
        "--translate",
        choices=LANGUAGES,
        nargs="+",
        default=(),
        help=f"write {TRANSLATIONS_NAME} too, the captions in these languages (default: none)",
    )


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(directories=(args.folder,))


def run(args: argparse.Namespace) -> int:
    """Write 00000.png and so on, and one table of their captions."""
    if args.count < 1 or args.size < 1:
        raise ConfigError(f"--count and --size must be at least 1, got {args.count}, {args.size}")
    _refuse_changed(args.folder)
    world = EmojiScenes(args.split, seed=args.seed)
    rows, translations = [("file", "caption")], [COLUMNS]
    with atomic_directory(args.folder, replace=True, marker=_MARKER) as folder:
        for number, scene in enumerate(world.distinct(args.count)):
            rows.append((f"{number:05d}.png", scene.caption))
            world.render(scene, args.size).save(folder / rows[-1][0])
            for language in args.translate:
                translations.append((scene.caption, translate_caption(scene, language)))
        tables = {TABLE_NAME: rows, TRANSLATIONS_NAME: translations if args.translate else []}
        for name, lines in tables.items():
            if lines:
                with (folder / name).open("w", encoding="utf-8", newline="") as table:
                    csv.writer(table).writerows(lines)
        (folder / _MARKER).write_text(_content(folder), encoding="utf-8")
    print(f"{args.count} scenes with captions in {args.folder}")
    return 0


def _refuse_changed(folder: Path) -> None:
    """Refuse a folder of scenes to which somebody added, or in which somebody changed, anything.

    Raises:
        InputError: it would be lost.
    """
    marker = folder / _MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") != _content(folder):
        raise InputError(
            f"{folder} holds files that were added or changed since `edgeclip scenes` wrote it: "
            "choose another folder, or delete it yourself"
        )


def _content(folder: Path) -> str:
    """Return a hash of the names and contents of all files but the marker."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MARKER:
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name!r} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
