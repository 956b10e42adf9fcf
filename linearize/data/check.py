"""What can be known of a source before anything is prepared: that its files are there, readable, and have the columns.

`check_source` opens each local file and reads its first rows, `ROWS` of all files together, and more, up to
`LOOKED_AT`, where the first row alone lacks the column. Compressed files are read as `datasets` reads them: by what
they hold, whatever their names. The hub is never asked.
"""

from __future__ import annotations

import json
import lzma
import re
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from linearize.data.config import DataConfig
from linearize.data.encoding import kind_of
from linearize.data.places import JSON, unpacked
from linearize.data.preference import check_pairs
from linearize.data.sources import files_of, unreadable
from linearize.errors import UserError

LOOKED_AT = 10 << 20
"""Characters of a JSON file that are looked at; `datasets` takes the columns from as many bytes."""
ROWS = 100
"""Rows that are looked at, in all files together, but one at least in each."""
_BETWEEN = re.compile(r"[\s,]*")
Row = dict[str, Any]


class NoRows(ValueError):
    """A file is what its name says, and holds nothing."""


def check_source(config: DataConfig) -> None:
    """Raise the errors of `prepare` that local files cause by what they are; of a Hub dataset nothing is known.

    Raises:
        UserError: for files that are missing, empty, of the wrong kind or split, damaged at their beginning, or without
            the columns that `config` needs.
    """
    check = check_pairs if config.item_rows > 1 else kind_of
    files = [file for file in files_of(config) if file.stat().st_size]
    for number, file in enumerate(files):
        try:
            rows = first_rows(file)
            first = next(rows, None)
            if not number and first is not None:  # the first file decides on the columns
                try:
                    check(first, config)
                except UserError:
                    check(_together(first, rows), config)
            for _ in islice(rows, ROWS // len(files)):
                pass
        except NoRows as error:
            if not number or file.suffix == ".parquet":  # `datasets` passes over others
                raise UserError(
                    f"data.source={config.source!r}: {file.name} has no rows; remove it, or choose other data"
                ) from error
        except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(unreadable(config, f"{file.name}: {error}")) from error


def first_rows(file: Path) -> Iterator[Row]:
    """Rows at the beginning of a file, with values of the right types; none where that cannot be told cheaply.

    Raises:
        NoRows: for a file without any.
        OSError, ValueError, EOFError, zlib.error, lzma.LZMAError: for a file that is not what its name says.
    """
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    with unpacked(file) as stream:
        if stream is None:
            return
        text = TextIOWrapper(stream, encoding="utf-8-sig")
        if file.suffix == ".txt":
            yield {"text": text.read(1 << 16)}
        else:
            yield from _json(text)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq
    from pyarrow import types

    with pq.ParquetFile(file) as opened:
        schema, count = opened.schema_arrow, opened.metadata.num_rows
    if not count:
        raise NoRows
    if b'"Json"' in (schema.metadata or {}).get(b"huggingface", b""):  # a text that `datasets` reads as JSON
        return

    def example(kind: Any) -> Any:
        if types.is_dictionary(kind):
            return example(kind.value_type)
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return ""
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return []
        return None if types.is_null(kind) else 0

    yield {field.name: example(field.type) for field in schema}


def _json(stream: TextIO) -> Iterator[Row]:
    """Rows of JSON lines, of a list of objects or texts, or the one that is the whole file."""
    number = 1
    while (line := stream.readline(LOOKED_AT)).isspace():
        number += 1
    if not line:
        raise NoRows
    if line.lstrip().startswith("["):
        text = line + stream.read(LOOKED_AT)
        yield from _elements(text[text.index("[") + 1 :], whole=not stream.read(1))
        return
    try:
        row = _value(line)
    except ValueError:
        text = line + stream.read(LOOKED_AT)  # an object may fill several lines
        if _is_broken(text) or not stream.read(1):
            row = _value(text)
            if isinstance(row, dict):
                yield row
        return
    seen = len(line)
    while isinstance(row, dict):
        yield row
        line, number = stream.readline(LOOKED_AT), number + 1
        seen += len(line)
        if not line or seen > LOOKED_AT:
            return
        try:
            row = row if line.isspace() else _value(line)
        except json.JSONDecodeError as error:
            text = line + stream.read(LOOKED_AT)
            if _is_broken(text, whole=not stream.read(1)):
                raise ValueError(f"line {number}: {error.msg}") from error
            return


def _is_broken(text: str, whole: bool = False) -> bool:
    """Whether what `text` begins with can be no JSON, however it goes on after the end of `text`."""
    place = _stop(text)
    if place is None or whole:
        return place is not None
    return "\n" in text.lstrip()[place:] and _stop(text + '""') == place  # quotes end a text that is only cut off


def _stop(text: str) -> int | None:
    """Where what `text` begins with stops being JSON, in characters after its white space; None where it does not."""
    try:
        _value(text)
    except json.JSONDecodeError as error:
        return error.pos
    return None


def _elements(text: str, whole: bool) -> Iterator[Row]:
    """Elements of a list as far as `text` has them, which is all of the file or its beginning."""
    place = 0
    if text.lstrip().startswith("]"):
        raise NoRows
    while not text.startswith("]", place := _BETWEEN.match(text, place).end()):  # type: ignore[union-attr]
        try:
            row, place = JSON.raw_decode(text, place)
        except ValueError:
            if whole:
                raise
            return
        if not isinstance(row, dict | str):
            return
        yield {"text": row} if isinstance(row, str) else row


def _value(line: str) -> Any:
    return JSON.raw_decode(line.lstrip())[0]


def _together(first: Row, rows: Iterator[Row]) -> Row:
    """The columns of all rows, each with its first value that is not null."""
    seen = dict(first)
    for row in rows:
        seen |= {name: value for name, value in row.items() if seen.get(name) is None}
    return seen
