"""What a checkpoint's files say once they are published, where that differs from the files in the folder.

The card names its repository and gets the results of the reports beside it; paths of the author's machine become their
last parts in the card, the recipe, the reports and the configurations. The folder's own files stay as they are.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import UserError
from linearize.hf.folder import read_mapping, read_text
from linearize.hub.card_data import for_repository
from linearize.hub.card_results import eval_results, held_out
from linearize.hub.contents import Contents
from linearize.hub.local_paths import Hider, known_paths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from linearize.evals.report import Report

CARD, RECIPE = "README.md", "recipe.yaml"
WIDTH = 110
"""Characters that are shown of a changed line."""


@dataclass(frozen=True)
class Published:
    """The files of a push."""

    files: dict[str, Path | bytes]
    """Path in the repository -> file, or its content where it differs from the file."""
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Path in the repository -> what differs, a line each."""

    def size(self, name: str) -> int:
        """Bytes of a file as it is published."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def publish(found: Contents, folder: Path, repo: str, *, adapter_of: str | None, read_source: bool) -> Published:
    """The files as they stand in the repository `repo`.

    Args:
        found: what is sent of the folder.
        folder: of the checkpoint.
        repo: `USER/NAME`.
        adapter_of: see `for_repository`.
        read_source: whether the source model's card may be looked up.

    Raises:
        UserError: for a card, recipe or report that cannot be read.
    """
    recipe = read_mapping(found.files[RECIPE]) if RECIPE in found.files else {}
    reports = [_read_report(path) for path in sorted(found.reports, key=lambda path: (path.stat().st_mtime, path.name))]
    told = [[report.model, report.teacher_model, report.settings.get("text")] for report in reports]
    hider = Hider(
        [*known_paths(recipe), *known_paths(told), *known_paths([str(folder.absolute()), str(folder.resolve())])]
    )
    texts: dict[str, tuple[str, str]] = {}
    for name, path in found.files.items():
        if name == CARD:
            text = read_text(path)
            results = [result for report in reports for result in _results(report, recipe)]
            new = for_repository(text, repo, adapter_of=adapter_of, results=results, read_source=read_source)
            texts[name] = text, hider.card(new)
        elif name == RECIPE:
            texts[name] = (text := read_text(path)), hider.yaml(text)
        elif path in found.reports or name.endswith("config.json"):
            texts[name] = (text := read_text(path)), hider.json(text)
    changed = {name: new for name, (old, new) in texts.items() if new != old}
    changes = {name: (_of_card if name == CARD else _of_lines)(texts[name][0], new) for name, new in changed.items()}
    files: Mapping[str, Path | bytes] = {name: text.encode() for name, text in changed.items()}
    return Published({**found.files, **files}, changes)


def _read_report(path: Path) -> Report:
    from linearize.evals.report import Report

    try:
        return Report.from_json(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} looks like a report of `linearize evaluate` and cannot be read as one ({error!r}); write it anew "
            "with --output, or move it away"
        ) from error


def _results(report: Report, recipe: Mapping[str, Any]) -> list[EvalResult]:
    told, data = report.settings, recipe.get("data")
    data = data if isinstance(data, Mapping) else {}
    on = held_out(told.get("text"), told.get("split"), data.get("source") or "demo", data.get("name"))
    return eval_results(report.student, **on, limit=told.get("limit"), teacher=report.teacher_model)


def _of_lines(old: str, new: str) -> list[str]:
    """Lines that differ, with what stands there now after what stood there."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return [_cut(line) for line in list(lines)[2:] if not line.startswith("@@")]


def _of_card(old: str, new: str) -> list[str]:
    from huggingface_hub import ModelCard

    one, other = ModelCard(old), ModelCard(new)
    before, after = one.data.to_dict(), other.data.to_dict()
    found = []
    for key in [key for key in dict.fromkeys([*before, *after]) if key != "model-index"]:
        a, b = before.get(key), after.get(key)
        if a != b:
            found.append(_cut(f"{key}: {_shown(b)}" + ("" if a is None else f" (was {_shown(a)})")))
    a, b = _listed(one.data.get("eval_results")), _listed(other.data.get("eval_results"))
    found += [_cut(f"result: {line}") for line in b if line not in a]
    found += [_cut(f"result no more: {line}") for line in a if line not in b]
    found += _of_lines(one.text, other.text)
    return found or ["the same metadata, laid out anew"]


def _listed(results: Iterable[EvalResult] | None) -> list[str]:
    told = [(r, f" {json.dumps(r.metric_args, default=str)}" if r.metric_args else "") for r in results or ()]
    return [f"{r.metric_type} {r.metric_value} on {r.dataset_name}{how}" for r, how in told]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
