"""Where documents come from: the rows of the demo text, of local files or of a Hub dataset, loaded by `datasets`.

What a row means is the business of `linearize.data.encoding`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize import demo
from linearize.data.config import DataConfig
from linearize.data.places import BadRow, Check, first_fault
from linearize.errors import UserError, did_you_mean, disk_full, local_path

_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
_OTHER_FILES = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), "unpack them"),
    ".csv": "from_csv('NAME.csv')",
    ".tsv": "from_csv('NAME.tsv', sep='\\t')",
    ".arrow": "from_file('NAME.arrow')",
}
"""Ends of files that cannot be read, and how they are unpacked, or read by `datasets.Dataset`; a name that has one is
no dataset of the Hub."""
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "dev"), "validation")
_SHUFFLE_BUFFER = 10_000


def open_source(config: DataConfig, folder: Path | None) -> tuple[Any, list]:
    """The rows of `config.source`, shuffled and limited as configured, and a fingerprint of their origin.

    `folder` keeps the Arrow copies of local files; without one, and for Hub datasets, `datasets` uses its
    own.

    Raises:
        UserError: for a path that does not exist, a dataset that cannot be reached, or an unknown split.
    """
    import datasets

    files, part = files_of(config), config.split[len(_whole(config.split)) :]
    cache = folder if files and folder else Path(datasets.config.HF_DATASETS_CACHE)
    try:
        with disk_full(cache, safe="nothing was changed"):
            rows, origin = _open_files(files, part, cache) if files else _open_hub(config)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, datasets.exceptions.DatasetsError) as error:
        if files:
            raise UserError(unreadable(config, first_fault(files) or _cause(error))) from error
        raise UserError(_not_from_hub(config, error)) from error
    if config.shuffle:
        extra = {"buffer_size": _SHUFFLE_BUFFER} if isinstance(rows, datasets.IterableDataset) else {}
        rows = rows.shuffle(seed=config.seed, **extra)
    if config.limit_documents is not None:
        rows = rows.take(config.limit_documents)
    return rows, origin


@contextmanager
def placed(config: DataConfig, check: Check) -> Iterator[None]:
    """Turn a row of `config.source` that cannot be used into a UserError that says where it stands.

    Args:
        config: whose rows are read inside the context.
        check: raises `BadRow` for a row that cannot be used.
    """
    try:
        yield
    except (BadRow, UnicodeDecodeError) as error:
        raise UserError(
            f"data.source={config.source!r}: {first_fault(files_of(config), check) or error}. Correct or remove that "
            "row, or choose another column with data.text_column=..., or other data"
        ) from error


def files_of(config: DataConfig) -> list[Path]:
    """The local files of `config.source` that belong to its split, all of one kind; none where it is a Hub dataset.

    Raises:
        UserError: for a path that does not exist, files of several or unknown kinds, a split without a file, and where
            all files are empty.
    """
    split = _whole(config.split)
    files = [demo.text_path(split)] if config.source == "demo" else _local_files(config.source, split)
    if files and not any(file.stat().st_size for file in files):
        raise UserError(f"data.source: {', '.join(map(str, files))} is empty; choose other data")
    return files


def _whole(split: str) -> str:
    """A split without its slice."""
    return split.partition("[")[0]


def _local_files(source: str, split: str) -> list[Path]:
    """As `files_of`."""
    path = local_path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file()]
        found = [p for p in files if p.suffix in _LOADERS] or [p for p in files if p.suffix in _OTHER_FILES]
    elif any(c in source for c in "*?["):
        pattern = str(path.relative_to(path.anchor))
        found = sorted(p for p in Path(path.anchor or ".").glob(pattern) if p.is_file())
    elif _names_a_path(source):
        raise UserError(f"data.source={source!r} does not exist (looked in {Path.cwd()})")
    else:
        return []
    kinds = {p.suffix for p in found}
    if len({_LOADERS.get(kind) for kind in kinds}) != 1 or not kinds <= set(_LOADERS):
        raise UserError(
            f"data.source={source!r} must name files of one kind; found {', '.join(sorted(kinds)) or 'none'}"
            f", known: {', '.join(_LOADERS)}; {_remedy(kinds)}"
        )
    return _of_split(found, split, source)


def _remedy(kinds: set[str]) -> str:
    """What to do with files of these kinds, of which at least one cannot be read, or that are several."""
    other = next((_OTHER_FILES[kind] for kind in sorted(kinds) if kind in _OTHER_FILES), None)
    if other is None:
        return "name files of one of them, as in texts/*.jsonl"
    if not other.startswith("from_"):
        return other
    return f"convert them: python -c \"from datasets import Dataset as D; D.{other}.to_parquet('NAME.parquet')\""


def _names_a_path(source: str) -> bool:
    """Whether what is not on this disk cannot be a dataset of the Hub either."""
    named = Path(source).suffix.lower() in {*_LOADERS, *_OTHER_FILES}
    return named or source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith("/")


def _of_split(files: list[Path], split: str, source: str) -> list[Path]:
    """Files whose names contain the split as a word; the others, and a file named alone, are `train`."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", f"{file.parent.name} {file.stem}".lower())
        named = [_SPLITS[word] for word in words if word in _SPLITS] if len(files) > 1 else []
        groups.setdefault(named[-1] if named else "train", []).append(file)
    chosen = _SPLITS.get(split, split)
    if chosen not in groups:
        raise UserError(f"data.split={split!r} is not in data.source={source!r}{did_you_mean(split, groups)}")
    return groups[chosen]


def _open_files(files: list[Path], part: str, folder: Path) -> tuple[Any, list]:
    import datasets

    options = {"sample_by": "document", "encoding": "utf-8-sig"} if files[0].suffix == ".txt" else {}
    rows = datasets.load_dataset(
        _LOADERS[files[0].suffix],
        data_files=[glob.escape(str(file.resolve())) for file in files],  # patterns, to datasets
        split=f"train{part}",
        cache_dir=str(folder),
        **options,
    )
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return rows, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _open_hub(config: DataConfig) -> tuple[Any, list]:
    import datasets

    rows = datasets.load_dataset(
        config.source, config.name, split=config.split, revision=config.revision, streaming=config.streaming
    )
    return rows, sorted(rows.info.download_checksums or {})  # its keys are URLs that hold the commit


def unreadable(config: DataConfig, fault: str) -> str:
    """What to say of local files that have this fault."""
    part = f" (data.split={config.split!r})" if "[" in config.split else ""
    return f"cannot read data.source={config.source!r}{part}: {fault}; check that the files are what their names say"


def _cause(error: Exception) -> str:
    return (f"{error.__cause__ or error}".splitlines() or [type(error).__name__])[0]


def _not_from_hub(config: DataConfig, error: Exception) -> str:
    where = f"data.source={config.source!r}"
    if "split" in str(error).lower():
        return f"data.split={config.split!r} of {where}: {error}"
    return (
        f"cannot load {where} from the Hub: {_cause(error)}. It is no local path either. Check the name (and "
        "data.name), the network, and HF_HUB_OFFLINE, which allows only what is already in the cache; or "
        "download the files and set data.source=path/to/*.parquet, or use data.source=demo"
    )
