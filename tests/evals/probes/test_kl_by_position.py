"""The probe kl_by_position against sums written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from linearize.evals.config import EvalConfig
from linearize.evals.measure import measure
from linearize.swap import teacher_path


def test_kl_by_position_equals_its_formula(converted: Callable[..., Any], pico_tokenizer: Any) -> None:
    model = converted("gdn", "LSL").eval()
    text = torch.randint(3, 97, (400,), generator=torch.Generator().manual_seed(0))
    probe = {"type": "kl_by_position", "length": 100, "windows": 3}
    config = EvalConfig(lengths=[100], windows=3, recall=False, branches=False, probes=[probe])
    found = measure(model, pico_tokenizer, config, token_ids=text, seq_len=50, has_teacher=True)
    rows = torch.stack([text[s : s + 100] for s in (0, 100, 200)])
    with torch.no_grad():
        student = model(input_ids=rows).logits.double()[:, :-1]
        with teacher_path(model):
            teacher = model(input_ids=rows).logits.double()[:, :-1]
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean(0)
    same = (student.argmax(-1) == teacher.argmax(-1)).double().mean(0)
    (entry,) = found.probes
    near, far = entry["result"]["buckets"]
    assert (near["first"], near["end"], far["end"]) == (1, 64, 100)
    assert [near["kl"], far["kl"]] == pytest.approx([float(kl[:63].mean()), float(kl[63:].mean())], rel=1e-4)
    assert [near["same"], far["same"]] == pytest.approx([float(same[:63].mean()), float(same[63:].mean())])
    assert near["kl"] > 1e-4, "untrained mixers are not their teacher"
    assert sum(float(x) for x in kl) / 99 == pytest.approx(found.divergence[0].kl, rel=1e-4)
