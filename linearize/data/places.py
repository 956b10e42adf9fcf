"""Where in local files a row stands that cannot be read or used: `a.jsonl, line 7`.

`datasets` tells a row of its own copy, or a byte of one text. So once something is wrong the files are read again, from
their beginning, up to the first row that is at fault.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ARCHIVES = (b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"7z\xbc\xaf\x27\x1c", b"Rar!")
"""How zip, zstd, lz4, 7z and rar begin: `datasets` may unpack them, and nothing is told of them here."""
_BLANK = b" \t\r\n\xef\xbb\xbf"
JSON = json.JSONDecoder(strict=False)
Row = dict[str, Any]
Check = Callable[[Row], None]


class BadRow(ValueError):
    """A row holds something that cannot be used; the message says what."""


def first_fault(files: Sequence[Path], check: Check = lambda row: None) -> str | None:
    """File, place and fault of the first row that cannot be read, or for which `check` raises a `BadRow`; None where
    none is found.
    """
    for file in files:
        place = ""
        try:
            for place, read in _rows(file):  # noqa: B007
                check(read())
        except ValueError as error:
            return f"{file.name}{place}: {error.msg if isinstance(error, json.JSONDecodeError) else error}"
        except (OSError, EOFError, lzma.LZMAError) as error:
            return f"{file.name}: {error}"
    return None


@contextmanager
def unpacked(file: Path) -> Iterator[BinaryIO | None]:
    """The bytes of a file, decompressed as `datasets` does, by what it holds; None for an archive."""
    with file.open("rb") as raw:
        start = raw.peek(8)[:8]
        if start.startswith(_ARCHIVES):
            yield None
            return
        opener = next((opener for magic, opener in _PACKED.items() if start.startswith(magic)), None)
        if opener is None:
            yield raw
            return
        with opener(raw) as stream:
            yield stream


def _rows(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Places of rows, and what reads each, or raises what is wrong with it."""
    if file.suffix == ".parquet":
        yield from _of_parquet(file)
        return
    with unpacked(file) as stream:
        if stream is None:
            return
        numbered = ((number, line) for number, line in enumerate(stream, 1) if line.strip(_BLANK))
        for count, (number, line) in enumerate(numbered):
            if file.suffix == ".txt":
                yield f", line {number}", partial(_text, line)
                continue
            if not count and line.lstrip(_BLANK).startswith(b"["):
                yield from _of_list(line + b"".join(rest for _, rest in numbered))
                return
            if not count and not _is_json(line):  # an object that fills several lines
                return
            yield f", line {number}", partial(_object, line)


def _of_parquet(file: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=1024):
            for index in range(len(batch)):
                number += 1
                yield f", row {number}", partial(_of_batch, batch, index)


def _of_batch(batch: Any, index: int) -> Row:
    return batch.slice(index, 1).to_pylist()[0]


def _of_list(content: bytes) -> Iterator[tuple[str, Callable[[], Row]]]:
    for number, value in enumerate(JSON.decode(content.decode("utf-8-sig")), 1):
        yield f", element {number}", partial(dict, value if isinstance(value, dict) else {"text": value})


def _text(line: bytes) -> Row:
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError as error:
        raise BadRow(f"{error.object[error.start]:#04x}, its byte {error.start + 1}, is no UTF-8") from error


def _object(line: bytes) -> Row:
    value: Any = JSON.decode(_text(line)["text"].lstrip("\ufeff").strip())
    if not isinstance(value, dict):
        raise BadRow(f"no object, but {value!r:.80}")
    json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs, which JSON can spell
    return value


def _is_json(line: bytes) -> bool:
    try:
        JSON.decode(_text(line)["text"].lstrip("\ufeff").strip())
    except json.JSONDecodeError:
        return False
    except BadRow:
        pass
    return True
