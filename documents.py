"""Documents from files and from the Hugging Face hub.

    for name, text in read_documents(["novels/"], "train"): ...
    reports = read_reports(["reports.jsonl"])               # documents with their summaries

A path of --data is a file, a folder, or `hf:owner/name`, a data set of the hub, which the library
`datasets` reads. Options follow the name of a data set, separated by commas:

    hf:emozilla/pg19,split=test                             # the default is split=train
    hf:monology/pile-uncopyrighted,take=100000              # only the first 100,000 rows

The other options are config=, revision= and field= (the field that holds the text). The rows are
read from the hub once and kept as a .jsonl file in out/cache; delete that file to read them again.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from cli import first_line, import_extra, replacing

ROW_FILES = (".jsonl", ".parquet")  # each row is a document
DOCUMENT_FILES = (".txt", ".md", ".py", *ROW_FILES)
CACHE = "out/cache"

# Folders beside the standard library's modules: tests, tables of characters, installed packages
LEFT_OUT = ("test", "tests", "idle_test", "idlelib", "encodings", "site-packages", "dist-packages")

# ---- documents and reports -----------------------------------------------------------------------


def read_documents(
    paths: Sequence[str | Path] | None, split: str = "all"
) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document of a split.

    paths: files (.txt, .md and .py hold one document, .jsonl and .parquet one in the field `text`
    of each row), folders of such files, or data sets of the hub (hf:owner/name); None: the source
    code of Python's standard library, which is on every machine.
    split: "train", "val" (about 10% of the documents) or "all". The split depends on nothing but
    the names of the documents. A single document is cut: its last 10% is for validation.
    Raises ValueError for content that is not text, and if there is no text at all.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split must be train, val or all, got {split!r}")
    if split == "all":
        yield from _all_documents(paths)
        return

    # The documents are read twice, because together they may not fit into memory: a first time for
    # their names, which decide the split, and a second time for their texts
    names = [name for name, _ in _all_documents(paths)]
    validation = _validation_numbers(names)
    for number, (name, text) in enumerate(_all_documents(paths)):
        if len(names) == 1:
            # A split needs at least two documents, so the only one is cut in two
            yield name, _part_of_text(text, split)
        elif (number in validation) == (split == "val"):
            yield name, text


def _validation_numbers(names: Sequence[str]) -> set[int]:
    """The numbers of the validation documents, given the names of all documents.

    About one document in ten is for validation, as a hash of its name decides. If that leaves none
    for validation, the last document is taken. If it leaves none for training, the first one is
    taken out.
    """
    numbers = set()
    for number, name in enumerate(names):
        # The first four bytes of the hash as a number, which is the same on every machine
        digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
        if int.from_bytes(digest[:4], "big") % 10 == 0:
            numbers.add(number)
    if len(numbers) == 0:
        numbers.add(len(names) - 1)
    elif len(numbers) == len(names):
        numbers.remove(0)
    return numbers


def _part_of_text(text: str, split: str) -> str:
    """The first 90% of a text for training, or its last 10% for validation."""
    cut = len(text) * 9 // 10
    if split == "train":
        return text[:cut]
    return text[cut:]


def _all_documents(paths: Sequence[str | Path] | None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document that is not blank, always in the same order.

    Raises ValueError if there are none.
    """
    empty = True
    if paths is None:
        documents = _standard_library()
    else:
        documents = _documents_in_files(paths)
    for name, text in documents:
        empty = False
        yield name, text
    if empty:
        forms = ", ".join(DOCUMENT_FILES)
        raise ValueError(
            f"{corpus_name(paths)}: no text found, give {forms} files that are not empty"
        )


def _documents_in_files(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document in files, folders or data sets that is not blank."""
    for record in _read_records(paths, ("text",), DOCUMENT_FILES):
        text = record.texts[0]
        if text.strip():
            yield record.name, text


def _standard_library() -> Iterator[tuple[str, str]]:
    """Yield (name, text) for the larger source files of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in _files_below(folder, (".py",), LEFT_OUT):
        if path.stat().st_size > 2000:
            name = path.relative_to(folder).as_posix()
            yield name, path.read_text(encoding="utf-8", errors="replace")


def read_reports(
    paths: Sequence[str | Path], document_field: str = "document", summary_field: str = "summary"
) -> list[tuple[str, str]]:
    """A list of (document, summary), one for each row of the files.

    paths: .jsonl or .parquet files, folders of them, or data sets of the hub (hf:owner/name).
    Raises ValueError, which names the file and the row, for a field that is missing, empty or not
    text; and if there are no rows.
    """
    fields = (document_field, summary_field)
    reports = []
    for record in _read_records(paths, fields, ROW_FILES):
        for field, text in zip(fields, record.texts):
            if not text.strip():
                raise ValueError(f"{record.place}: its field `{field}` is empty")
        reports.append(record.texts)
    if not reports:
        forms = ", ".join(ROW_FILES)
        raise ValueError(
            f"{corpus_name(paths)}: no reports found, give {forms} files that are not empty"
        )
    return reports


def corpus_name(paths: Sequence[str | Path] | None) -> str:
    """The name of a corpus in messages and results."""
    if paths is None:
        return "the standard library's sources"
    return ", ".join(str(path) for path in paths)


# ---- records: the rows of files ------------------------------------------------------------------


class _File(NamedTuple):
    """A file to read documents from."""

    name: str  # the name of its document; a row adds its number to it
    source: str  # its path, or the data set as the user wrote it, for messages
    path: Path


class _Record(NamedTuple):
    """The texts in one row of a file, or in a whole text file."""

    name: str
    place: str  # the file and the row, for messages
    texts: tuple[str, ...]  # one for each field that was asked for


def _read_records(
    paths: Sequence[str | Path], fields: tuple[str, ...], suffixes: tuple[str, ...]
) -> Iterator[_Record]:
    """Yield a record for each row of the files, always in the same order.

    Raises ValueError if a row lacks one of the fields, or if a field is not text.
    """
    for given in paths:
        for file in _find_files(str(given), fields, suffixes):
            for number, row in _read_rows(file.path, fields, suffixes):
                # A row is named after its file and its number, as in "reports.jsonl:12"
                name = file.name
                place = file.source
                if number is not None:
                    name += f":{number}"
                    place += f", row {number}"
                yield _Record(name, place, _texts(row, fields, place))


def _find_files(given: str, fields: tuple[str, ...], suffixes: tuple[str, ...]) -> Iterator[_File]:
    """Yield the files of one path: a file, a folder or a data set of the hub."""
    path = Path(given)
    if given.startswith("hf:"):
        yield _file_of_data_set(given, fields)
    elif path.is_dir():
        for file in _files_below(path, suffixes):
            yield _File(file.relative_to(path).as_posix(), str(file), file)
    else:
        yield _File(path.name, str(path), path)


def _files_below(
    folder: Path, suffixes: tuple[str, ...], left_out: Iterable[str] = ()
) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, always in the same order.

    Hidden subfolders (.git, .venv) and those with a name in left_out are skipped.
    """
    for parent, subfolders, names in os.walk(folder):
        visible = [name for name in subfolders if not name.startswith(".")]
        # os.walk goes on with what this list holds, so the list is changed in place
        subfolders[:] = sorted(set(visible) - set(left_out))
        for name in sorted(names):
            if name.endswith(suffixes):
                yield Path(parent, name)


def _read_rows(
    path: Path, fields: tuple[str, ...], suffixes: tuple[str, ...]
) -> Iterator[tuple[int | None, dict]]:
    """Yield (number, row) for each row of a file. A text file is a single row without a number."""
    # A missing file is reported as missing, whatever its suffix: stat raises FileNotFoundError
    path.stat()
    if path.suffix not in suffixes:
        raise ValueError(f"{path} is none of {', '.join(suffixes)}: rename or convert it")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, fields)
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    else:
        try:
            yield None, {"text": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out"
            ) from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (number, row) for each line of a .jsonl file that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # neither JSON nor UTF-8
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object")
            yield number, row


def _parquet_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """Yield (number, row) for each row of a .parquet file, with these fields alone."""
    # pyarrow reads a local file more than ten times as fast as datasets does
    parquet = import_extra("pyarrow.parquet", "parquet", path)
    number = 0
    try:
        file = parquet.ParquetFile(path)
        _check_fields(file.schema_arrow.names, fields, "it")
        for batch in file.iter_batches(batch_size=256, columns=list(fields)):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ValueError, OSError) as error:
        # The messages of pyarrow have many lines and don't name the file
        raise ValueError(f"{path} can't be read: {first_line(error)}") from None


def _texts(row: dict, fields: tuple[str, ...], place: str) -> tuple[str, ...]:
    """The fields of a row. Raises ValueError if one is missing or not text."""
    _check_fields(row, fields, place)
    for field in fields:
        if not _is_text(row[field]):
            raise ValueError(f"{place}: its field `{field}` is not text")
    return tuple(row[field] for field in fields)


def _check_fields(found: Collection[str], fields: tuple[str, ...], place: str) -> None:
    """Raise ValueError if one of the fields is not among those found."""
    for field in fields:
        if field not in found:
            names = ", ".join(found)
            raise ValueError(f"{place} has no field `{field}` (its fields: {names})")


def _is_text(value: object) -> bool:
    """Whether a value is a string that can be written as UTF-8.

    Half of a surrogate pair can't be, although JSON may contain one.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---- data sets of the hub ------------------------------------------------------------------------

HUB_OPTIONS = ("config", "split", "take", "field", "revision")
HUB_FORM = "hf:owner/name[,config=...][,split=train][,take=N][,field=text][,revision=...]"


def _file_of_data_set(given: str, fields: tuple[str, ...]) -> _File:
    """The .jsonl file in out/cache with these fields of a data set, read from the hub if missing.

    From a file, documents can be read as often as needed, and training can resume without the hub.
    """
    # The option `field` says which field of the data set is read as the field `text`
    name, options = _parse_data_set(given)
    names_on_hub = fields
    if "field" in options:
        if len(fields) > 1:
            raise ValueError(
                f"{given}: field= is for text alone, the fields of reports have flags of their own"
            )
        names_on_hub = (options["field"],)

    # The file is named after everything that decides what is in it
    key = json.dumps([name, sorted(options.items()), fields])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = Path(CACHE) / f"hub-{digest}.jsonl"

    # Read the rows from the hub, unless an earlier run did
    if not path.is_file():
        with (
            tqdm(desc=f"reading {given}", unit="row") as bar, replacing(path) as temporary,
            open(temporary, "w", encoding="utf-8") as file
        ):
            for texts in _hub_rows(given, name, options, names_on_hub):
                row = dict(zip(fields, texts))
                file.write(json.dumps(row) + "\n")
                bar.update()
    return _File(name, given, path)


def _parse_data_set(given: str) -> tuple[str, dict[str, str]]:
    """The name and the options of `hf:owner/name,option=value`. Raises ValueError if malformed."""
    # The parts of "hf:owner/name,split=test,take=100" stand between commas
    name, *parts = given.removeprefix("hf:").split(",")
    options = {}
    for part in parts:
        option, _, value = part.partition("=")
        if option not in HUB_OPTIONS:
            raise ValueError(f"{given}: `{option}` is unknown, a hub data set is {HUB_FORM}")
        options[option] = value

    # Every option needs a value, and `take` a positive number
    take = options.get("take", "1")
    if not name or "" in options.values() or not take.isdecimal() or int(take) < 1:
        raise ValueError(f"{given}: a hub data set is {HUB_FORM}, N at least 1")
    return name, options


def _hub_rows(
    given: str, name: str, options: dict[str, str], fields: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    """Yield the fields of each row of a data set, as the rows arrive from the hub."""
    datasets = import_extra("datasets", "hub", given)
    take = None  # islice then goes on to the last row
    if "take" in options:
        take = int(options["take"])
    try:
        rows = datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "train"),
            revision=options.get("revision"), streaming=True
        )
        for number, row in enumerate(islice(rows, take), 1):
            yield _texts(row, fields, f"row {number}")
    except Exception as error:
        # datasets has errors of its own, and so have the libraries with which it reaches the hub
        reason = first_line(error)
        if "scripts are no" in reason:
            reason += ": try revision=refs/convert/parquet, the hub's own copy without one"
        raise ValueError(f"{given} can't be read: {reason}") from None
