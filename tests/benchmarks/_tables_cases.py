"""Caption tables, label files, text files and folders, written and then spoiled in known ways."""

import csv
import io
import json
import os
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

WORDS = (
    *("a", "red", "Bäume", "dog;", "owl|", "“round”", "5'", 'say "hi"', "o\u2028ne", "pa\u0085ge"),
    *("tab", "猫", "e\u0301t\u00e9", "#0", "sep=,", "=1+1", "-", "caption", "ﬁle", "\u200bthin"),
)
NAMES = ("a.png", "b c.JPG", "deep/c.webp", "deep/er/d.jpeg", "café.png", "f#1.png", "g,h.png")
Encode = Callable[[str], bytes]


@dataclass(slots=True)
class Case:
    """A folder or file on disk, and what a careful reader must make of it.

    Attributes:
        what: how it was made, for the report of a failure.
        path: the folder, or the file.
        truth: the captions of each image, or the items of a file.
        damaged: whether it must not be read as if nothing were wrong.
        others: how many files of a folder must be counted as left out.
        unmarked: whether it is in UTF-16 without a mark, which may be refused too.
    """

    what: str
    path: Path
    truth: dict[str, tuple[str, ...]] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)
    damaged: bool = False
    others: int = 0
    unmarked: bool = False


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 6))).strip()


def touch(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


UNMARKED = ("utf-16-le", "utf-16-be")
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
HEADERS = (
    *(("file", "caption"), ("File", "Caption"), ("image", "caption"), ("filepath", "title")),
    *(
        ("image_name", "comment"),
        ("File Name", "Text"),
        (" filename ", "Description"),
        ("PATH", "raw"),
    ),
)
SEPARATORS = {",": "captions.csv", ";": "captions.csv", "\t": "captions.tsv", "|": "captions.txt"}
# What spoils a table: each takes its rows (header first) and returns them, or text.
DAMAGES = (
    *("more cells", "fewer cells", "no such image", "empty caption", "open quote", "quote inside"),
    *("bad byte", "nul", "no header", "no rows", "row missing", "separator inside", "outside"),
)


def table_case(draw: random.Random, root: Path) -> Case:
    """A folder with a caption table in one of the usual forms; every second one is spoiled."""
    names = draw.sample(NAMES, draw.randint(1, len(NAMES)))
    truth = {
        name: tuple(sentence(draw) for _ in range(draw.choice((1, 1, 2, 5)))) for name in names
    }
    for name in names:
        touch(root, unicodedata.normalize(draw.choice(("NFC", "NFD")), name))
    rows = [(name, caption) for name, captions in truth.items() for caption in captions]
    if draw.random() < 0.25:
        return _json_case(draw, root, truth, rows)
    separator = draw.choice(tuple(SEPARATORS))
    head = draw.choice(HEADERS)
    extra = draw.random() < 0.3
    flip = draw.random() < 0.3
    slash = draw.choice(("/", "/", "\\", "./"))
    lines: list[list[str]] = [[*head, *(["split"] if extra else [])]]
    for name, caption in rows:
        shown = unicodedata.normalize(draw.choice(("NFC", "NFD")), name)
        shown = f"./{shown}" if slash == "./" else shown.replace("/", slash)
        lines.append([shown, caption, *(["train"] if extra else [])])
    if flip:
        lines = [line[::-1] for line in lines]
    damage = draw.choice(DAMAGES) if draw.random() < 0.5 else ""
    at = draw.randrange(1, len(lines))
    _spoil_rows(draw, lines, at, damage, names, extra)
    end = draw.choice(("\n", "\r\n", "\r"))
    stream = io.StringIO()
    quoting: Literal[0, 1] = csv.QUOTE_ALL if draw.random() < 0.5 else csv.QUOTE_MINIMAL
    writer = csv.writer(stream, delimiter=separator, lineterminator=end, quoting=quoting)
    for number, line in enumerate(lines):
        if damage == "separator inside" and number == at:
            stream.write(separator.join(line) + end)
            continue
        writer.writerow(line)
        if draw.random() < 0.1:
            stream.write(draw.choice((end, f"  {end}")))
    text = stream.getvalue()
    encoding = draw.choice(ENCODINGS)
    if damage == "open quote":
        text += f'"{names[0]}{separator}never closed'
    if damage == "quote inside":
        text += f'"{names[0]}" x{separator}y' + end
    if damage == "nul":
        text = f"{text}{names[0]}{separator}a\0b{end}"
    data = text.encode(encoding)
    if damage == "bad byte":
        data = text.encode() + b"\xe9\xff" + end.encode()
    path = root / SEPARATORS[separator]
    path.write_bytes(data)
    what = f"table {path.name} {encoding} {end!r} {head} {damage or 'whole'}"
    return Case(what, root, truth, damaged=bool(damage), unmarked=encoding in UNMARKED)


def _spoil_rows(
    draw: random.Random, lines: list[list[str]], at: int, damage: str, names: list[str], extra: bool
) -> None:
    caption = lines[0].index(next(cell for cell in lines[0] if cell != "split" and cell in _TEXTS))
    image = next(
        place for place, cell in enumerate(lines[0]) if place != caption and cell != "split"
    )
    if damage == "more cells":
        lines[at].append("more")
    elif damage == "fewer cells":
        lines[at].pop()
    elif damage == "no such image":
        lines[at][image] = "gone.png"
    elif damage == "outside":
        lines[at][image] = "../a.png"
    elif damage == "empty caption":
        lines[at][caption] = draw.choice(("", "  "))
    elif damage == "no header":
        del lines[0]
    elif damage == "no rows":
        del lines[1:]
    elif damage == "row missing":
        name = unicodedata.normalize("NFC", lines[at][image])
        lines[1:] = [
            line for line in lines[1:] if unicodedata.normalize("NFC", line[image]) != name
        ]
    elif damage == "separator inside":
        lines[at][caption] = "red, round; blue\tthing|x"


_TEXTS = {head[1] for head in HEADERS}
JSON_DAMAGES = ("cut", "no such image", "no caption", "not an object", "bad byte")


def _json_case(
    draw: random.Random, root: Path, truth: dict[str, tuple[str, ...]], rows: list[tuple[str, str]]
) -> Case:
    form = draw.choice(("lines", "lists", "coco", "karpathy"))
    damage = draw.choice(JSON_DAMAGES) if draw.random() < 0.4 else ""
    if form == "lines":
        objects: list[object] = [{"image": name, "caption": text} for name, text in rows]
        _spoil_objects(objects, damage)
        text, name = "\n".join(map(json.dumps, objects)), "captions.jsonl"
    elif form == "lists":
        objects = [{"file": name, "captions": list(own)} for name, own in truth.items()]
        _spoil_objects(objects, damage)
        text, name = json.dumps(objects, indent=1, ensure_ascii=False), "captions.json"
    elif form == "coco":
        images: list[object] = [
            {"id": number, "file_name": name} for number, name in enumerate(truth)
        ]
        numbers = {name: number for number, name in enumerate(truth)}
        notes: list[object] = [{"image_id": numbers[name], "caption": text} for name, text in rows]
        _spoil_objects(notes if damage == "no caption" else images, damage)
        text, name = json.dumps({"images": images, "annotations": notes}), "captions_val2017.json"
    else:
        objects = [
            {"filename": name, "sentences": [{"raw": item} for item in own]}
            for name, own in truth.items()
        ]
        _spoil_objects(objects, damage)
        text, name = json.dumps({"images": objects}), "dataset_coco.json"
    data = text.encode()
    if damage == "cut":
        data = data[: len(data) - draw.randint(2, 9)]
    elif damage == "bad byte":
        data = b"\xe9 " + data
    (root / name).write_bytes(data)
    return Case(f"table {name} {form} {damage or 'whole'}", root, truth, damaged=bool(damage))


def _spoil_objects(objects: list[object], damage: str) -> None:
    last = objects[-1]
    assert isinstance(last, dict)
    if damage == "no such image":
        key = next(name for name in ("image", "file", "file_name", "filename") if name in last)
        last[key] = "gone.png"
    elif damage == "no caption":
        for key in ("caption", "captions", "sentences"):
            last.pop(key, None)
    elif damage == "not an object":
        objects[-1] = 7


def lines_case(draw: random.Random, root: Path, kind: str) -> Case:
    """A file with one text or one label on each line; every third one is spoiled."""
    items = [sentence(draw) for _ in range(draw.randint(1, 9))]
    if kind == "labels":
        items = list(dict.fromkeys([*items, "one more"]))  # a single one may not hold a comma
    damage = ""
    if draw.random() < 0.35:
        damage = draw.choice(("bad byte", "nul", "empty", "twice" if kind == "labels" else "gap"))
    written = list(items)
    if damage == "gap":
        written.insert(0, draw.choice(("", " \t")))
    elif damage == "twice":
        written.append(items[0])
    elif damage == "empty":
        written = ["", " "]
    elif damage == "nul":
        written.append("a\0b")
    if kind == "labels" and not damage and draw.random() < 0.5:
        written.insert(draw.randrange(len(written)), "")  # which is skipped
    end = draw.choice(("\n", "\r\n", "\r"))
    encoding = draw.choice(ENCODINGS)
    text = end.join(written) + draw.choice(("", end, end + end))
    data = text.encode(encoding)
    if damage == "bad byte":
        data = text.encode() + end.encode() + b"\xe9\xff"
    path = root / draw.choice(("labels.txt", "names", "list.lst"))
    path.write_bytes(data)
    what = f"{kind} {encoding} {end!r} {damage or 'whole'}"
    return Case(what, path, items=items, damaged=bool(damage), unmarked=encoding in UNMARKED)


IMAGE_NAMES = (
    "a.png",
    "B.JPG",
    "c d.webp",
    "é.jpeg",
    "e\u0301.gif",
    "x.TIFF",
    "new\nline.png",
    "q.bmp",
)
OTHER_NAMES = ("clip.mov", "page.pdf", "notes.md", "none", "drawing.svg", "a.png.bak", "x.psd")


def folder_case(draw: random.Random, root: Path) -> Case:
    """A folder with images, captions, hidden files, links and whatever else lies around."""
    folders = ["", *draw.sample(("sub/", "sub/deep/", "photos.jpg/", "Ünder/"), draw.randint(0, 3))]
    truth: dict[str, tuple[str, ...]] = {}
    others: set[str] = set()
    hidden: list[str] = []
    for place in folders:
        for name in draw.sample(IMAGE_NAMES, draw.randint(0, 4)):
            truth[place + name] = ()
        others.update(place + name for name in draw.sample(OTHER_NAMES, draw.randint(0, 2)))
        if draw.random() < 0.3:
            others.add(f"{place}._a.png")
        if draw.random() < 0.3:
            hidden.append(f"{place}.DS_Store")
    truth["always.png"] = ()
    for name in (*truth, *others, *hidden):
        touch(root, name)
    for name in draw.sample(sorted(truth), draw.randint(0, len(truth))):
        beside = Path(name).with_suffix(draw.choice((".txt", ".TXT"))).as_posix()
        touch(root, beside)  # a caption, part of the image
    extra = 0
    if draw.random() < 0.5:
        (root / "gone.jpg").symlink_to("nowhere.jpg")
        extra += 1
    if draw.random() < 0.3:
        (root / "loop").symlink_to(root)
        extra += 1
    if draw.random() < 0.3:
        os.mkfifo(root / "pipe.png")
        extra += 1
    if draw.random() < 0.3:
        touch(root, ".thumbs/t.png")
        extra += 1
    if draw.random() < 0.4:
        elsewhere = root.with_name(root.name + "-elsewhere")
        touch(elsewhere, "linked.png")
        (root / "link").symlink_to(elsewhere)
        truth["link/linked.png"] = ()
    what = f"folder of {len(truth)} images, {len(others) + extra} others"
    return Case(what, root, truth, others=len(others) + extra)


def noise_case(draw: random.Random, root: Path) -> Case:
    """A folder whose caption table has bytes changed, removed, doubled and inserted at random."""
    case = table_case(draw, root)
    tables = [
        path
        for path in root.iterdir()
        if path.suffix in {".csv", ".tsv", ".txt", ".json", ".jsonl"}
    ]
    for path in tables:
        data = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(data) + 1)
            match draw.choice(("change", "insert", "remove", "double", "cut")):
                case "change":
                    data[at : at + 1] = bytes((draw.randrange(256),))
                case "insert":
                    data[at:at] = draw.choice(
                        (b'"', b",", b"\t", b"\r", b"\n", b"\0", b"#", b"{", b"\xff")
                    )
                case "remove":
                    del data[at : at + draw.randint(1, 5)]
                case "double":
                    data[at:at] = data[at : at + 20]
                case "cut":
                    del data[max(at, 1) :]
        path.write_bytes(data)
    case.what, case.damaged = f"noise in {case.what}", True
    return case
