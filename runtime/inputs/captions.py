"""Read the captions of a folder of images: a table or annotation file, or a text beside each."""

import csv
import fnmatch
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import (
    TABLES,
    beside_name,
    is_table,
    leave_out,
    table_folders,
)
from edgeclip.runtime.inputs.text_files import read_text, split_lines

Captions = tuple[tuple[str, ...], ...]
# Columns and JSON keys by what people call them, the first is taken; after that of a caption may
# come a number.
_IMAGE_NAMES = (
    *("file", "filename", "file_name", "filepath", "file_path"),
    *("image", "image_name", "image_path", "image_file", "img", "path"),
)
CAPTION_NAMES = (
    *("caption", "captions", "title", "text", "description", "comment", "sentence"),
    *("sentences", "raw"),
)
_NEEDS = "needs a header with the columns file and caption"
_FIRST = 100  # rows that tell which folder the names of a table are relative to
_NUMBER = re.compile(r"#\d+$")  # Flickr's token files: NAME.jpg#0 to NAME.jpg#4
# Flickr30k's results.csv quotes nothing, and one of its rows lacks the second bar.
_FLICKR_COLUMNS = ["image_name", "comment_number", "comment"]
_FLICKR_ROW = re.compile(r"\s*([^|]+?)\s*\|\s*\d+\s*(?:\||\s)(.*)")
_OF_COCO = "captions_*.json"  # one file for each split
_COCO_SPLIT = re.compile(r"captions_([a-z]+)\d*\.json")
# Flickr8k's names of the pictures of a split, beside its captions.
_SPLIT_LIST = re.compile(r".*\.(train|dev|test)images\.txt")


@dataclass(frozen=True, slots=True)
class _Row:
    """What a table says of an image; `where` is the file and the line, for messages."""

    where: str
    image: str
    captions: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Annotations:
    """What is known of each image of a folder.

    Attributes:
        captions: those of each image; none where it has none.
        splits: the split that an annotation file puts each image into, in the words of that file,
            such as `restval`; None where it says nothing.
    """

    captions: Captions
    splits: tuple[str | None, ...]


def read_captions(folder: Path, images: Sequence[Path], *, strict: bool = False) -> Captions | None:
    """Return the captions of each image, one or several; None if the folder has none at all.

    See `read_annotations` for where they stand.

    Raises:
        InputError: some images have a caption and others none; or see `read_annotations`.
    """
    found = read_annotations(folder, images, strict=strict)
    if not any(found.captions):
        table = next(iter(_find_tables(folder, images)), None)
        if table is None:
            return None
        raise InputError(
            f"{table}: it names no images of the {len(images)} here with a caption: put the images "
            "that it names beside it"
        )
    missing = [path for path, own in zip(images, found.captions, strict=True) if not own]
    if missing:
        table = next(iter(_find_tables(folder, images)), folder)
        raise InputError(
            f"{table}: {len(missing)} of {len(images)} images have no caption, the first "
            f"is {missing[0].relative_to(folder)}: give every image one"
        )
    return found.captions


def read_annotations(folder: Path, images: Sequence[Path], *, strict: bool = False) -> Annotations:
    """Return the captions and the split of each image, as far as the folder tells.

    Captions stand in a table in the folder, or in a `NAME.txt` beside each `NAME.jpg`, one on a
    line. A table is `captions.csv`, `.tsv` or `.txt` with a header (comma, TAB, semicolon or bar;
    columns as `file,caption`, `image,caption`, `filepath,title`), a Flickr token file, Flickr30k's
    `results.csv`, `captions.jsonl`, or a JSON file of COCO's or of Karpathy's form; COCO's are one
    for each split and lie in `annotations`. It may name an image on several rows. Names are
    relative to the folder, or all to one of its subfolders; both slashes are read, and any Unicode
    form. A split is told by Karpathy's files, by the name of COCO's, and by Flickr8k's lists.

    Raises:
        InputError: a table is damaged, has a row with more or fewer cells than its header, an
            empty caption, or an image that is not there (an annotation file in JSON may name more
            than are there). The message names the file and the line.
    """
    tables = _find_tables(folder, images)
    if not tables:
        captions = tuple(_captions_beside(images))
        return Annotations(captions, (None,) * len(captions))
    found = _captions_of_tables(folder, tables, images, strict=strict)
    others = [path for path in _all_tables(folder, images) if path not in tables]
    others += [text for text in _texts_beside(images).values() if text not in tables]
    leave_out(
        [(path, f"captions are read from {tables[0].name}") for path in others], strict=strict
    )
    return found


def _find_tables(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return the table that is read; of COCO's, all that name images of the folder."""
    ordered = _all_tables(folder, images)
    first = ordered[:1]
    if not first or not fnmatch.fnmatchcase(first[0].name.casefold(), _OF_COCO):
        return first
    of_coco = [path for path in ordered if fnmatch.fnmatchcase(path.name.casefold(), _OF_COCO)]
    if len(of_coco) == 1:
        return of_coco
    names = _Names(folder, images)
    # The annotations of 2014 and of 2017 come in one folder, and hardly anybody has both.
    return [path for path in of_coco if names.knows(list(_rows(path)))] or of_coco[:1]


def _all_tables(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return the tables of a folder, the one to be read first."""
    beside = {beside_name(path) for path in images}
    files = [
        path
        for place in (folder, *table_folders(folder))
        for path in sorted(place.iterdir())
        if is_table(path) and path.is_file()
    ]
    files = [path for path in files if path.suffix != ".txt" or beside_name(path) not in beside]
    ordered = [
        path for name in TABLES for path in files if fnmatch.fnmatchcase(path.name.casefold(), name)
    ]
    # Flickr8k's lemmas are no captions.
    return sorted(dict.fromkeys(ordered), key=lambda path: ".lemma." in path.name.casefold())


def _texts_beside(images: Sequence[Path]) -> dict[tuple[Path, str], Path]:
    """Return the text files beside images, by `beside_name`."""
    wanted = {beside_name(path) for path in images}
    texts = (path for folder in {path.parent for path in images} for path in folder.iterdir())
    found = {beside_name(path): path for path in texts if path.suffix.lower() == ".txt"}
    return {name: path for name, path in sorted(found.items()) if name in wanted}


def _captions_beside(images: Sequence[Path]) -> list[tuple[str, ...]]:
    texts = _texts_beside(images)
    found = []
    for image in images:
        text = texts.get(beside_name(image))
        lines = split_lines(read_text(text)) if text is not None and text.is_file() else []
        found.append(tuple(line.strip() for line in lines if line.strip()))
    return found


def _captions_of_tables(
    folder: Path, tables: Sequence[Path], images: Sequence[Path], *, strict: bool
) -> Annotations:
    names = _Names(folder, images)
    captions: dict[Path, list[str]] = {}
    splits: dict[Path, str] = {}
    absent: dict[Path, str] = {}
    for table in tables:
        rows = list(_rows(table))
        if not rows:
            raise InputError(f"{table} names no images: write one row for each caption")
        base = names.base(rows)
        for row in rows:
            if not row.captions:
                raise InputError(f"{row.where}: {row.image} has an empty caption")
            image = names.find(row.image, base, row.where)
            if image is not None:
                captions.setdefault(image, []).extend(row.captions)
                if row.split is not None:
                    splits[image] = row.split
            elif table.suffix.lower() == ".json":
                absent[table.parent / row.image] = f"named in {table.name}, but not there"
            elif not names.is_left_out(row.image, base):
                raise InputError(f"{row.where}: {row.image} is no image in this folder")
    leave_out(list(absent.items()), strict=strict)
    splits |= _listed_splits(tables[0].parent, names)
    return Annotations(
        tuple(tuple(captions.get(image, ())) for image in images),
        tuple(splits.get(image) for image in images),
    )


def _listed_splits(folder: Path, names: "_Names") -> dict[Path, str]:
    """Return the splits by Flickr8k's lists, a name on each line."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = _SPLIT_LIST.fullmatch(path.name.casefold())
        if match is None:
            continue
        lines = [line.strip() for line in split_lines(read_text(path)) if line.strip()]
        rows = [_Row(f"{path}, line {number}", name, ()) for number, name in enumerate(lines, 1)]
        base = names.base(rows) if rows else ""
        for row in rows:
            image = names.find(row.image, base, row.where)
            if image is not None:
                found[image] = match[1]
    return found


class _Names:
    """Find images by the names that tables give them.

    Args:
        folder: the folder that the table lies in.
        images: the images under it.
    """

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self._folder = folder
        self._own = unicodedata.normalize("NFC", folder.resolve().name)
        self._exact: dict[str, list[Path]] = {}
        self._folded: dict[str, list[Path]] = {}
        self._bases: set[str] = set()
        for path in images:
            name = _plain(path.relative_to(folder).as_posix())
            self._exact.setdefault(name, []).append(path)
            self._folded.setdefault(name.casefold(), []).append(path)
            self._bases.update(f"{parent}/" for parent in PurePosixPath(name).parents[:-1])

    def base(self, rows: Sequence[_Row]) -> str:
        """Return the subfolder, with its slash, that the names of a table are relative to.

        Raises:
            InputError: there are several.
        """
        first = rows[:_FIRST]
        if not self._bases or any(
            self.find(row.image, "", row.where) or self.is_left_out(row.image, "") for row in first
        ):
            return ""
        bases = sorted(
            base
            for base in self._bases
            if any(self.find(row.image, base, row.where) for row in first)
        )
        if len(bases) > 1:
            raise InputError(
                f"{rows[0].where}: {rows[0].image} and the others could be in {bases[0]} or in "
                f"{bases[1]}: write the folder before each name"
            )
        return bases[0] if bases else ""

    def knows(self, rows: Sequence[_Row]) -> bool:
        """Tell whether any of the first rows names an image."""
        base = self.base(rows)
        return any(self.find(row.image, base, row.where) for row in rows[:_FIRST])

    def find(self, name: str, base: str, where: str) -> Path | None:
        """Return the image of that name; None if there is none.

        Raises:
            InputError: there are several.
        """
        for tried in self._spellings(name):
            for known, key in (
                (self._exact, base + tried),
                (self._folded, (base + tried).casefold()),
            ):
                found = known.get(key, [])
                if len(found) > 1:
                    raise InputError(
                        f"{where}: {name} may be {found[0].name!r} or {found[1].name!r}: "
                        "rename one of them"
                    )
                if found:
                    return found[0]
        return None

    def is_left_out(self, name: str, base: str) -> bool:
        """Tell whether that is a file in the folder, though no image that can be read here."""
        return any(
            tried and ".." not in tried.split("/") and (self._folder / (base + tried)).is_file()
            for tried in (name.strip().replace("\\", "/"), *self._spellings(name))
        )

    def _spellings(self, name: str) -> Iterator[str]:
        """Yield what a name may mean: as it is, without #0, or as a path through the folder."""
        for given in dict.fromkeys((name, name.replace("\\", "/"))):
            for short in dict.fromkeys((given, _NUMBER.sub("", given))):
                plain = _plain(short)
                yield plain
                _, inside, rest = f"/{plain}".rpartition(f"/{self._own}/")
                if inside:
                    yield rest


def _plain(name: str) -> str:
    """Return a relative path without `./` and doubled slashes, in Unicode's form NFC."""
    parts = unicodedata.normalize("NFC", name.strip()).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _rows(table: Path) -> Iterator[_Row]:
    text, suffix = read_text(table), table.suffix.lower()
    if suffix == ".json":
        return _rows_of_json(table, text)
    if suffix == ".jsonl":
        return _rows_of_json_lines(table, text)
    return _rows_of_table(table, text)


def _rows_of_table(table: Path, text: str) -> Iterator[_Row]:
    lines = split_lines(text)
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise InputError(f"{table}, line 1: {_NEEDS}; it is empty")
    told = re.fullmatch(r"sep=(.)", lines[first].strip(), re.IGNORECASE)  # of Excel
    first += bool(told)
    for delimiter in (told[1],) if told else ("\t", ";", "|", ","):
        (header,) = csv.reader(lines[first : first + 1], delimiter=delimiter, skipinitialspace=True)
        columns = _columns(header)
        if delimiter == "|" and [cell.strip() for cell in header] == _FLICKR_COLUMNS:
            yield from _rows_of_flickr30k(table, lines, first + 1)
            return
        if columns is not None:
            reader = csv.reader(
                io.StringIO(text, newline=""),
                delimiter=delimiter,
                strict=True,
                skipinitialspace=True,
            )
            records = _records(table, reader, skip=first + 1)
            yield from _rows_below(table, records, *columns)
            return
    if "\t" not in lines[first]:
        raise InputError(f"{table}, line {first + 1}: {_NEEDS}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{table}, line {number}"
            cells = line.split("\t")
            if len(cells) != 2:
                count = len(cells) - 1
                raise InputError(f"{where}: {count} TABs, where one parts name and caption")
            # Flickr's token files quote nothing, and a caption may begin with a quote.
            name, caption = cells if _NUMBER.search(cells[0]) else map(_unquoted, cells)
            yield _Row(where, name, caption_texts(caption))


def _rows_of_flickr30k(table: Path, lines: Sequence[str], first: int) -> Iterator[_Row]:
    for number, line in enumerate(lines[first:], first + 1):
        if line.strip():
            where = f"{table}, line {number}"
            match = _FLICKR_ROW.fullmatch(line)
            if match is None:
                raise InputError(f"{where}: needs image_name| comment_number| comment")
            yield _Row(where, match[1], caption_texts(match[2]))


def _unquoted(cell: str) -> str:
    """Return what a cell of CSV means, or the cell as it is where it is none."""
    try:
        ((plain,),) = csv.reader([cell], delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return cell
    return plain


def _records(table: Path, reader: Any, *, skip: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV reader that are not blank, with the number of their first line."""
    line = 1
    try:
        for row in reader:
            if line > skip and any(cell.strip() for cell in row):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:  # the reader may be far beyond the row that failed
        raise InputError(
            f"{table}, the row from line {line} on: {error}; close every quote, and write it twice "
            "inside a quoted caption"
        ) from error


def _columns(header: list[str]) -> tuple[int, int, list[int]] | None:
    """Return how many columns there are, and which hold the image and the captions."""
    names = [re.sub(r"[ -]+", "_", cell.strip().casefold()) for cell in header]
    image = next((names.index(name) for name in _IMAGE_NAMES if name in names), None)
    for wanted in CAPTION_NAMES:
        pattern = re.compile(rf"{wanted}_?\d*")
        captions = [place for place, name in enumerate(names) if pattern.fullmatch(name)]
        if captions and image is not None:
            return len(header), image, captions
    return None


def _rows_below(
    table: Path,
    records: Iterator[tuple[int, list[str]]],
    count: int,
    image: int,
    captions: list[int],
) -> Iterator[_Row]:
    for line, row in records:
        where = f"{table}, line {line}"
        while len(row) > count and not row[-1].strip():  # Excel fills up
            row.pop()
        if len(row) != count:
            raise InputError(
                f"{where}: {len(row)} cells, where the header has {count}: put a caption that "
                'holds the separator into "quotes"'
            )
        yield _Row(where, row[image], caption_texts([row[place] for place in captions]))


def _rows_of_json_lines(table: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            yield _row_of_entry(f"{table}, line {number}", _parse(table, line, number))


def _rows_of_json(table: Path, text: str) -> Iterator[_Row]:
    data = _parse(table, text, 1)
    if isinstance(data, list):
        for number, entry in enumerate(data, 1):
            yield _row_of_entry(f"{table}, entry {number}", entry)
    elif isinstance(data, dict) and isinstance(data.get("annotations"), list):
        yield from _rows_of_coco(table, data)
    elif isinstance(data, dict) and isinstance(data.get("images"), list):
        for number, entry in enumerate(data["images"], 1):
            row = _row_of_entry(f"{table}, image {number}", entry)
            folder = entry.get("filepath")  # Karpathy: a folder beside "filename"
            places = (table.parent, table.parent.parent)
            in_folder = isinstance(folder, str) and any((at / folder).is_dir() for at in places)
            image = f"{folder}/{row.image}" if in_folder else row.image
            split = entry.get("split")
            yield replace(row, image=image, split=split if isinstance(split, str) else None)
    elif isinstance(data, dict):
        for number, (name, value) in enumerate(data.items(), 1):
            yield _Row(f"{table}, entry {number}", name, caption_texts(value))
    else:
        raise InputError(f"{table}, line 1: give a list of images with captions, or an object")


def _rows_of_coco(table: Path, data: Mapping[str, Any]) -> Iterator[_Row]:
    names: dict[object, str] = {}
    for number, image in enumerate(data.get("images") or [], 1):
        try:
            names[image["id"]] = str(image["file_name"])
        except (TypeError, KeyError):
            raise InputError(f"{table}, image {number}: needs id and file_name") from None
    named = _COCO_SPLIT.fullmatch(table.name.casefold())
    split = named[1] if named else None
    for number, item in enumerate(data["annotations"], 1):
        where = f"{table}, annotation {number}"
        try:
            yield _Row(where, names[item["image_id"]], caption_texts(item["caption"]), split)
        except (TypeError, KeyError):
            raise InputError(
                f"{where}: needs a caption and the image_id of one of the images"
            ) from None


def _row_of_entry(where: str, entry: object) -> _Row:
    given = entry if isinstance(entry, dict) else {}
    image = next((given[name] for name in _IMAGE_NAMES if name in given), None)
    texts = next((given[name] for name in CAPTION_NAMES if name in given), None)
    if not isinstance(image, str) or texts is None:
        raise InputError(f'{where}: needs an object such as {{"file": "a.jpg", "caption": "..."}}')
    return _Row(where, image, caption_texts(texts))


def captions_of_entry(entry: Mapping[str, object]) -> tuple[str, ...]:
    """Return the captions that an object holds under the first known name; none if under none."""
    return next((caption_texts(entry[name]) for name in CAPTION_NAMES if name in entry), ())


def caption_texts(value: object) -> tuple[str, ...]:
    """Return the captions of a text, or of a list of texts or of sentences (Karpathy's "raw")."""
    items = value if isinstance(value, list) else [value]
    items = [item.get("raw") if isinstance(item, dict) else item for item in items]
    return tuple(item.strip() for item in items if isinstance(item, str) and item.strip())


def _parse(table: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{table}, line {line + error.lineno - 1}: {error.msg}: no JSON") from None
    except RecursionError:
        raise InputError(f"{table}, line {line}: nested too deeply") from None
