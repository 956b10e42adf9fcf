"""What can be known of a source before anything is prepared: that its files are there, readable, and have the columns.

`check_source` opens each local file and reads its first row, and more, up to `LOOKED_AT` of them, where the first row
alone lacks the column. The hub is never asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.data.config import DataConfig
from linearize.data.encoding import kind_of
from linearize.data.preference import check_pairs
from linearize.data.sources import files_of, unreadable
from linearize.errors import UserError

LOOKED_AT = 10 << 20
"""Characters of a JSON file that are looked at; `datasets` takes the columns from as many bytes."""
_JSON, _BETWEEN = json.JSONDecoder(strict=False), re.compile(r"[\s,]*")
Row = dict[str, Any]


def check_source(config: DataConfig) -> None:
    """Raise the errors of `prepare` that local files cause by what they are; of a Hub dataset nothing is known.

    Raises:
        UserError: for files that are missing, empty, of the wrong kind or split, damaged at their beginning, or without
            the columns that `config` needs.
    """
    check = check_pairs if config.item_rows > 1 else kind_of
    for number, file in enumerate(file for file in files_of(config) if file.stat().st_size):
        try:
            rows = first_rows(file)
            first = next(rows, None)
            if number or first is None:  # the first file decides on the columns
                continue
            try:
                check(first, config)
            except UserError:
                check(_together(first, rows), config)
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(unreadable(config, ValueError(f"{file.name}: {error}"))) from error


def first_rows(file: Path) -> Iterator[Row]:
    """Rows at the beginning of a file, with values of the right types; none where that cannot be told cheaply.

    Raises:
        OSError, ValueError: for a file that is not what its name says.
    """
    if file.suffix == ".parquet":
        yield from _parquet(file)
    elif file.suffix == ".txt":
        with file.open(encoding="utf-8") as stream:
            yield {"text": stream.read(1 << 16)}
    else:
        yield from _json(file)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq
    from pyarrow import types

    schema = pq.read_schema(file)
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


def _json(file: Path) -> Iterator[Row]:
    """Rows of JSON lines, of a list of objects or texts, or the one that is the whole file."""
    with file.open(encoding="utf-8-sig") as stream:
        while (line := stream.readline(LOOKED_AT)).isspace():
            pass
        if line.lstrip().startswith("["):
            text = line + stream.read(LOOKED_AT)
            yield from _elements(text[text.index("[") + 1 :], whole=not stream.read(1))
            return
        try:
            row = _value(line)
        except ValueError:
            text = line + stream.read(LOOKED_AT)  # an object may fill several lines
            if not stream.read(1) and isinstance(row := _value(text), dict):
                yield row
            return
        seen = len(line)
        while isinstance(row, dict):
            yield row
            line = stream.readline(LOOKED_AT)
            seen += len(line)
            if not line or seen > LOOKED_AT:
                return
            row = row if line.isspace() else _value(line)


def _elements(text: str, whole: bool) -> Iterator[Row]:
    """Elements of a list as far as `text` has them, which is all of the file or its beginning."""
    place = 0
    while not text.startswith("]", place := _BETWEEN.match(text, place).end()):  # type: ignore[union-attr]
        try:
            row, place = _JSON.raw_decode(text, place)
        except ValueError:
            if whole:
                raise
            return
        if not isinstance(row, dict | str):
            return
        yield {"text": row} if isinstance(row, str) else row


def _value(line: str) -> Any:
    return _JSON.raw_decode(line.lstrip())[0]


def _together(first: Row, rows: Iterator[Row]) -> Row:
    """The columns of all rows, each with its first value that is not null."""
    seen = dict(first)
    for row in rows:
        seen |= {name: value for name, value in row.items() if seen.get(name) is None}
    return seen
