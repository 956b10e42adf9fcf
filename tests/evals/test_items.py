"""Answers question by question, student against teacher: what is kept, what is counted, and what is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest

from linearize.errors import UserError
from linearize.evals.items import Items, compare, comparison_rows, items_of
from linearize.evals.measure import Measurement
from linearize.evals.statistics import Paired, wilson
from linearize.evals.table import side_by_side
from linearize.evals.task_groups import GROUPS, asked_groups, expand, group_mean, leaves, main_metric


def sample(doc: int, scores: list[float], options: list[str], gold: int, **metrics: Any) -> dict[str, Any]:
    best = max(range(len(scores)), key=lambda i: scores[i])
    norm = max(range(len(scores)), key=lambda i: scores[i] / len(options[i]))
    return {
        "doc_id": doc,
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "filtered_resps": [(score, False) for score in scores],
        "arguments": [("Q", f" {option}") for option in options],
        "doc_hash": f"d{doc}",
        "prompt_hash": "p",
        "acc": float(best == gold),
        "acc_norm": float(norm == gold),
        **metrics,
    }


SAMPLES = [sample(1, [-3.0, -4.0], ["a", "long"], 1), sample(0, [-9.0, -4.0], ["a", "b"], 0)]


def test_what_was_chosen_is_what_the_main_metric_goes_by() -> None:
    normed = items_of(SAMPLES, {"acc": 0.0, "acc_norm": 0.5}, " ")
    assert normed is not None and (normed.metric, normed.right, normed.chosen) == ("acc_norm", "01", "1 1")
    plain = items_of(SAMPLES, {"acc": 0.0}, " ")
    assert plain is not None and (plain.metric, plain.right, plain.chosen) == ("acc", "00", "1 0")
    assert plain.documents == normed.documents
    other = items_of([{**SAMPLES[0], "prompt_hash": "q"}, SAMPLES[1]], {"acc": 0.0}, " ")
    assert other is not None and other.documents != plain.documents


def test_tasks_without_options_or_without_right_and_wrong() -> None:
    greedy = {**SAMPLES[0], "filtered_resps": [(-2.0, True)], "acc": 1}
    found = items_of([greedy], {"acc": 1.0, "perplexity": 7.4}, " ")
    assert found is not None and (found.right, found.chosen) == ("1", "")
    assert items_of(SAMPLES, {"perplexity": 7.4}, " ") is None
    assert items_of([{**SAMPLES[0], "f1": (1, 0)}], {"f1": 0.3}, " ") is None
    assert items_of(SAMPLES, {}, " ") is None


def test_written_answers_are_told_apart_by_filter() -> None:
    def written(text: str, filter_: str, right: int) -> dict[str, Any]:
        return {**SAMPLES[0], "filter": filter_, "filtered_resps": [text], "exact_match": right}

    samples = [written("72", "strict", 1), written("the 7", "loose", 0)]
    strict = items_of(samples, {"exact_match,strict": 1.0, "exact_match,loose": 0.0}, " ")
    assert strict is not None and strict.metric == "exact_match,strict" and strict.right == "1"
    same = items_of([written("72", "strict", 0)], {"exact_match,strict": 0.0}, " ")
    assert same is not None and same.chosen == strict.chosen and len(same.chosen) == 8


def measured(**tasks: tuple[str, str]) -> Measurement:
    items = {task: Items("acc", right, chosen, "d" + task) for task, (right, chosen) in tasks.items()}
    scores = {task: {"acc": right.count("1") / len(right)} for task, (right, _) in tasks.items()}
    return Measurement(tasks=scores, items=items, groups={"both": ["one", "two"]})


STUDENT = measured(one=("1100", "0 1 2 3"), two=("10", "0 0"), words=("10", ""))
TEACHER = measured(one=("1110", "0 1 0 3"), two=("00", "1 0"), words=("11", ""))


def test_comparisons_count_what_both_answered() -> None:
    found = compare(STUDENT, TEACHER)
    assert list(found) == ["both", "one", "two", "words"]
    one = found["one"]
    assert one.counts == Paired(both=2, wins=0, losses=1, neither=1) and one.difference == -0.25
    assert (one.low, one.high) == one.counts.interval()
    assert one.alike == 3 and one.agreement == (0.75, *wilson(3, 4))
    assert found["words"].alike is None and found["words"].agreement is None
    both = found["both"]
    assert both.counts == Paired(both=2, wins=1, losses=1, neither=2) and both.alike == 4
    assert both.difference == pytest.approx((-1 / 4 + 1 / 2) / 2)  # a mean of tasks, not of questions
    assert both.low < both.difference < both.high


def test_other_questions_are_not_compared() -> None:
    other = measured(one=("1110", "0 1 0 3"))
    changed = Items("acc", "1110", "0 1 0 3", "other")
    with pytest.raises(UserError, match="asked different questions of one"):
        compare(STUDENT, Measurement(items={"one": changed}))
    assert list(compare(STUDENT, other)) == ["both", "one"]


def test_the_table_shows_them_and_json_keeps_them() -> None:
    rows = comparison_rows(compare(STUDENT, TEACHER))
    one = next(row for row in rows if row[0] == "one")
    assert one[1:3] == ["4", "-25.0"] and one[4] == "75.0%" and one[6:] == ["0/1/3", "1.000"]
    assert next(row for row in rows if row[0] == "words")[4:6] == ["–", "–"]
    assert "| one " in side_by_side(STUDENT, TEACHER) and "won/lost/tied" in side_by_side(STUDENT, TEACHER)
    assert "won/lost" not in side_by_side(STUDENT, None)
    again = Measurement.from_dict(json.loads(json.dumps(STUDENT.to_dict())))
    assert again == STUDENT
    old = {k: v for k, v in STUDENT.to_dict().items() if k not in ("items", "groups")}
    assert Measurement.from_dict(old).items == {}  # a report of an earlier version


def test_groups() -> None:
    assert expand(["commonsense", "piqa", "mmlu"]) == [*GROUPS["commonsense"], "mmlu"]
    assert asked_groups(["commonsense", "mmlu"]) == {"commonsense": list(GROUPS["commonsense"])}
    nested = {"mmlu": ["stem", "arts"], "stem": ["maths"], "arts": ["music", "maths"]}
    assert leaves(nested) == {"mmlu": ["maths", "music"], "stem": ["maths"], "arts": ["music", "maths"]}
    scores = {"a": {"acc": 0.5, "acc_norm": 0.7}, "b": {"acc": 0.2}, "p": {"perplexity": 9.0}}
    assert group_mean(["a", "b"], scores) == pytest.approx((0.7 + 0.2) / 2)
    assert group_mean(["a", "p"], scores) is None and group_mean([], scores) is None


def test_main_metrics() -> None:
    assert main_metric({"acc": 1.0, "acc_stderr": 0.0, "acc_norm": 1.0}) == "acc_norm"
    assert main_metric({"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.1}) == "exact_match,strict"
    assert main_metric({"rouge": 1.0}) is None
    both = {"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.1, "exact_match,loose": 1.0}
    assert Measurement(tasks={"gsm8k": both}).main_metrics("gsm8k") == ["exact_match,strict", "exact_match,loose"]
