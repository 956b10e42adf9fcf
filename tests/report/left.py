"""What commands leave for a report, made up: folders of conversions, and the JSON of `evaluate` and `bench`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from linearize.bench import BenchReport, Speed
from linearize.bench_training import StepSpeed
from linearize.evals.divergence import Divergence
from linearize.evals.measure import Measurement
from linearize.evals.recall_score import RecallScore
from linearize.evals.report import Report
from linearize.evals.text import BranchLoss, TextLoss

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script> & \"$x$\" 'é'"
FACTS: dict[str, Any] = {
    "source": "tiny",
    "family": "llama",
    "mixer": "gdn",
    "settings": {"type": "gdn"},
    "layers": "LSL",
    "new_parameters": 1234,
    "source_parameters": 50_000,
    "state_bytes": [4096, 0, 4096],
    "kv_bytes_per_token": [64, 64, 64],
    "reach": [None, None, 128],
    "causal": True,
    "dtype": "float32",
    "tensors": [],
}


def measurement(loss: float, *, student: bool = True, tokens: int = 0, **more: Any) -> Measurement:
    """Losses at 32 and 64 tokens, recall, and of students branches, divergence and a probe."""
    losses = [TextLoss(n, loss + n / 1000, 100, 4, ((1, 16, loss + 1), (16, n, loss))) for n in (32, 64)]
    found = Measurement(losses=losses, recall=[RecallScore(1, 200, 0.75, 32, 0.6, 0.9)], tokens=tokens, **more)
    if student:
        found.branches = [BranchLoss("linear", 32, loss + 0.5)]
        found.divergence = [Divergence(32, 0.125, 0.5)]
        buckets = [{"first": 1, "end": 16, "kl": 0.5, "same": 0.25}, {"first": 16, "end": 64, "kl": 0.25, "same": 0.5}]
        settings = {"type": "kl_by_position", "length": 64, "windows": 2}
        found.probes = [{"probe": settings, "result": {"length": 64, "buckets": buckets}}]
    return found


def folder(path: Path, *, loss: float = 3.0, **facts: Any) -> Path:
    """A finished conversion with two stages, the first of which logs its layers."""
    (path / "run").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "run" / "plan.json").write_text(json.dumps({**FACTS, **facts}))
    (path / "run" / "recipe.yaml").write_text(f"# {EVIL}\nmodel: tiny\n")
    points = {
        "teacher": measurement(2.5, student=False),
        "untrained": measurement(loss + 2),
        "after finetune": measurement(loss, tokens=2000, prompt="<b>Once", sample=EVIL, notes=[f"note {EVIL}"]),
    }
    written = [(name, m.to_dict()) for name, m in points.items()]
    (path / "run" / "measurements.json").write_text(json.dumps(written))
    first = {"layer_0": 4.0, "layer_2": 8.0, "loss": 6.0}
    for number, (stage, values) in enumerate((("attention_transfer", first), ("finetune", {"loss": loss, "kl": 1.0}))):
        place = path / "run" / f"{number}-{stage}"
        place.mkdir()
        lines = []
        for step in range(40):
            halved = {key: value * 0.5 ** (step / 10) for key, value in values.items()}
            more = {"grad_norm": 1.0, "lr": 1e-3, "tokens": 25 * (step + 1), "tokens_per_second": 500.0}
            lines.append(json.dumps({"step": step, **halved, **more}))
        (place / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 40, "lo']))
    return path


def bench(path: Path) -> Path:
    """Two lengths, at the longer of which softmax did not fit."""
    speeds = [Speed(p, 512, 1000.0, 50.0, 2**20, 2**24) for p in ("teacher", "student")]
    speeds += [Speed("teacher", 2048, error="out of memory"), Speed("student", 2048, 900.0, 49.0, 2**20, 2**25)]
    settings = {"batch": 1, "dtype": "float32", "device": "made up"}
    steps = [StepSpeed("finetune", 1, 64, 123.0, None, 2**26)]
    BenchReport(speeds, steps, settings, "made up too").to_json(path)
    return path


def evaluation(path: Path, model: str) -> Path:
    """A task beside the usual measurements."""
    student, teacher = measurement(3.5), measurement(2.5, student=False)
    for m, value in ((student, 0.4), (teacher, 0.6)):
        m.tasks = {"piqa": {"acc": value, "acc_stderr": 0.015}}
    Report(model, student, "tiny", teacher, {}, {"torch": EVIL}).to_json(path)
    return path
