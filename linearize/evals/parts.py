"""Finished parts of an evaluation, kept beside its report, so that a stopped one goes on where it was.

`Parts(report, made_of)` reads what an earlier run of the same evaluation left in `report.json.parts`; `take` gives a
part from there, or takes it and writes it down; `remove` tidies up. A part is a measurement by its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from linearize.errors import UserError, check_target, is_partial, local_path, write_whole
from linearize.evals.measurement import Measurement
from linearize.hf.load import hub_file
from linearize.locks import held
from linearize.schema import differences

SUFFIX = ".parts"
"""What the name of a report ends with while its parts are taken."""
LOCK = ".lock"
"""What the name of the file ends with that a running evaluation holds locked."""
MODEL_FILES = (
    "*.safetensors*",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "*.tiktoken",
    "vocab*",
    "merges*",
    "*.model",
    "*.spm",
    "*.py",
    "*.jinja",
)
"""What a model is made of in its folder, where reports may lie too."""


class Parts:
    """What of an evaluation is finished.

    Args:
        report: the file that the report will be written to; None keeps nothing.
        made_of: plain data that the result depends on: parts of an evaluation of anything else are not used.
        say: receives what is used again, and why something is not.
    """

    def __init__(self, report: str | Path | None, made_of: Mapping[str, Any], say: Callable[[str], Any]):
        self.path = None if report is None else _beside(Path(report).expanduser())
        self.made_of: dict[str, Any] = json.loads(json.dumps(made_of))
        self.say = say
        self.done = {} if self.path is None else self._read(self.path)

    def take(self, name: str, measure: Callable[[], Measurement]) -> Measurement:
        """The part called `name`, taken now unless it is there."""
        if name in self.done:
            self.say(f"{name}: taken over from the run before")
            return Measurement.from_dict(self.done[name])
        found = measure()
        if self.path is not None:
            self.done[name] = found.to_dict()
            content = {"made_of": self.made_of, "done": self.done}
            write_whole(self.path, json.dumps(content, ensure_ascii=False, allow_nan=False))
        return found

    def remove(self) -> None:
        """Forget everything, once the report is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            before, done = kept["made_of"], kept["done"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            self.say(f"{path} cannot be read and is not used")
            return {}
        if before == self.made_of:
            return done
        key, (old, new) = next(iter(differences(before, self.made_of).items()))
        self.say(f"{path} is of another evaluation ({key}: {old!r}, now {new!r}) and is not used")
        return {}


def check_report(path: str | Path) -> None:
    """Raise a UserError if neither a report can be written at `path` nor its finished parts beside it."""
    check_target(path)
    check_target(_beside(Path(path)))


def held_report(path: str | Path | None) -> AbstractContextManager[None]:
    """Inside the context no other evaluation has its parts and its report at `path`; nothing for None.

    Raises:
        UserError: when another process evaluates into it.
    """
    if path is None:
        return nullcontext()
    report = Path(path).expanduser()
    message = f"{report} is in use by another running evaluation; wait for it, or give another file with --output"
    return held(report.with_name(f".{report.name}{LOCK}"), message, remove=True)


def _beside(report: Path) -> Path:
    return report.with_name(f"{report.name}{SUFFIX}")


def model_made_of(name: str, revision: str | None = None) -> Any:
    """What tells a model from one of the same name: the commit of a hub repository, else sizes and times of files."""
    if not Path(name).is_dir():
        found = hub_file(name, "config.json", revision)
        return [name, None if found is None else found.parent.name]
    folder = Path(name).resolve()
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern)} | {*folder.glob("adapter/*")}
    return [str(folder), files_made_of(files)]


def files_made_of(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of the last change of each file, but for what evaluations keep there, under any name."""
    kept = (path for path in sorted(files) if not (path.name.endswith((SUFFIX, LOCK)) or is_partial(path)))
    stats = [(str(path.resolve()), path.stat()) for path in kept if path.is_file()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def named_files(value: Any) -> list[Path]:
    """Files that any text in plain data is the path of, such as the questions of a probe."""
    if isinstance(value, Mapping | list | tuple):
        children = value.values() if isinstance(value, Mapping) else value
        return [path for child in children for path in named_files(child)]
    try:
        path = local_path(value) if isinstance(value, str) else None
    except UserError:  # a longer text, which is no path
        return []
    return [path] if path is not None and path.is_file() else []


def text_made_of(token_ids: torch.Tensor) -> str:
    """A digest of held-out text [N]."""
    return hashlib.sha256(token_ids.to(torch.int64).numpy().tobytes()).hexdigest()
