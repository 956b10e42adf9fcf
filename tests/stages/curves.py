"""Loss curves of every stage on the demo teacher: what they are now, and `make golden` to write them down anew.

`python tests/stages/curves.py` writes `curves.json` beside this file: per case the losses of all steps. Each case also
states a factor: the mean loss of its last quarter is below that factor times its first loss.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_suffix(".json")
STEPS, ROWS, TOKENS = 16, 4, 64
LAYERS = "LLSLLS"


class Case(NamedTuple):
    """One curve."""

    factor: float
    """Of the first loss, below which the mean of the last quarter lies."""
    stage: dict[str, Any]
    """Settings of the stage; steps and sizes are those above."""
    mixer: str = "gdn"


ALIGN = {"train": ["attention"], "lr": 3e-3}
KL = {"type": "logit_kl", "train": ["all"], "lr": 1e-3}
CASES = {
    "attention_transfer": Case(0.25, {"type": "attention_transfer", "lr": 1e-2}),
    "attention_transfer l2": Case(0.45, {"type": "attention_transfer", **ALIGN, "loss": "l2", "where": "output"}),
    "attention_transfer cosine": Case(0.55, {"type": "attention_transfer", **ALIGN, "loss": "cosine"}),
    "matrix_align": Case(0.6, {"type": "matrix_align", "train": ["mixer", "q", "k"], "lr": 2e-2}, mixer="mamba2"),
    "hidden_align block": Case(0.55, {"type": "hidden_align", **ALIGN, "where": "block"}),
    "hidden_align stream": Case(0.75, {"type": "hidden_align", **ALIGN, "where": "stream"}),
    "hidden_align final": Case(0.75, {"type": "hidden_align", **ALIGN, "where": "final"}),
    "logit_kl": Case(0.6, KL),
    "logit_kl reverse": Case(0.55, {**KL, "divergence": "reverse", "temperature": 2.0}),
    "logit_kl Jensen-Shannon and ce": Case(0.75, {**KL, "divergence": "jensen_shannon", "ce": 0.5}),
    "logit_kl cached": Case(0.6, {**KL, "teacher": "cached", "top_k": 64}),
    "finetune": Case(0.75, {"type": "finetune", "train": ["all"], "lr": 1e-3}),
    "finetune lora": Case(0.8, {"type": "finetune", "train": ["mixer"], "lora": {"r": 8}, "lr": 3e-3}),
    "long_context": Case(0.7, {"type": "long_context", "train": ["all"], "lr": 1e-3, "seq_len": 2 * TOKENS}),
    "dpo": Case(0.6, {"type": "dpo", "train": ["all"], "lr": 2e-5}),
}


class Bench:
    """A student of the demo teacher, and rows of text and of pairs, all made once."""

    def __init__(self, folder: Path):
        import torch
        from trainable import write_pairs

        from linearize.data import DataConfig, prepare
        from linearize.demo import model_path
        from linearize.hf.auto import linearized
        from linearize.hf.load import load
        from linearize.swap import swapped

        self.folder = folder
        self.source, self.tokenizer = load(model_path(), dtype=torch.float32)

        def student(mixer: str) -> Any:
            model = copy.deepcopy(self.source)
            layers = [0 if letter == "L" else None for letter in LAYERS]
            linearized(model, {"mixers": [{"type": mixer, "backend": "torch"}], "layers": layers})
            for name, attn in swapped(model).items():
                attn.mixer.initialise(f"{name}.mixer", seed=0)
            return model

        self.student: Callable[[str], Any] = student

        def rows(**settings: Any) -> Any:
            return prepare(DataConfig(**settings), self.tokenizer, cache_dir=folder / "cache")

        self.data: Callable[..., Any] = lambda length: rows(source="demo", seq_len=length, max_tokens=20_000)
        pairs = str(write_pairs(folder / "pairs.jsonl", 200))
        self.pairs = rows(source=pairs, format="preference", seq_len=TOKENS)

    def stage(self, case: Case) -> Any:
        """The stage, with its sizes."""
        from linearize.registry import family_of, find
        from linearize.stages.base import Stage

        settings = {"batch_size": ROWS, "warmup": 0.0, **case.stage}
        cls: Any = find("stages", settings["type"], Stage)
        settings["tokens"] = STEPS * ROWS * cls.item_rows * settings.get("seq_len", TOKENS)
        return cls(cls.Config.model_validate(settings), family_of(self.source.config))

    def curve(self, case: Case) -> list[float]:
        """The losses of all steps."""
        model, stage = self.student(case.mixer), self.stage(case)
        data = self.pairs if stage.item_rows == 2 else self.data(case.stage.get("seq_len", TOKENS))
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            stage.run(model, data, Path(folder))
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


def main() -> None:
    """Measure all curves and write them down."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench, curves = Bench(Path(folder)), {}
        for name, case in CASES.items():
            curves[name] = [float(f"{loss:.6g}") for loss in bench.curve(case)]
            ratio = sum(curves[name][-STEPS // 4 :]) / (STEPS // 4) / curves[name][0]
            print(f"{name:28} {curves[name][0]:10.4f} -> x {ratio:.3f}, to be below {case.factor}")
    lines = [f"{json.dumps(name)}: {json.dumps(losses)}" for name, losses in curves.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
