"""What is published of a folder: no tokens, nothing from elsewhere, no paths of the author's machine; and what a push
says of all this beforehand.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from linearize.errors import UserError
from linearize.evals.divergence import Divergence
from linearize.evals.items import Asked
from linearize.evals.measure import Measurement
from linearize.evals.report import Report
from linearize.evals.text import TextLoss
from linearize.hub.contents import contents, token_line
from linearize.hub.local_paths import Hider, known_paths
from linearize.hub.published import publish
from linearize.hub.push import push

SECRET = "AbCdEfGh12" * 4


@pytest.mark.parametrize(
    "text",
    [
        f"hf_{SECRET}",
        f"api_org_{SECRET}",
        f"hf_oauth_{SECRET}",
        f"hf_oauth__refresh_{SECRET}",
        f"hf_jwt_{SECRET}",
        "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzIjp7fX0.c2ln",
        f'{{"text": "\\nhf_{SECRET}"}}',
        f"https://ada:hf_{SECRET}@example.org",
        f"https://example.org/?token%3Dhf_{SECRET}",
        f"token_hf_{SECRET}",
    ],
)
def test_tokens_of_every_kind_are_found(text: str) -> None:
    assert token_line(f"one\ntwo {text} three".encode()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download",
        "hf_oauth_expiration_minutes_of_it",
        f"shelf_{SECRET}",
        "hf_a_name_that_is_very_long_too",
    ],
)
def test_what_is_no_token_passes(text: str) -> None:
    assert token_line(text.encode()) is None


@pytest.mark.parametrize("kind", ["hf_oauth_", "api_org_"])
def test_a_token_stops_the_push_and_is_not_shown(folder: Path, kind: str) -> None:
    (folder / "LICENSE").write_text(f"free\n{kind}{SECRET}\n")
    with pytest.raises(UserError, match="LICENSE, line 2, has a token of the hub in it") as told:
        push(folder, "ada/x", dry_run=True, say=lambda text: None)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "tokenizer.json", "swap.py", "model.safetensors.index.json"])
def test_links_to_what_is_not_published_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (outside := tmp_path / name).write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"private")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link to .*, a file outside its folder"):
        contents(folder)
    (folder / name).unlink()
    (folder / name).write_bytes(outside.read_bytes())
    assert name in contents(folder).files


def test_links_inside_a_folder(folder: Path) -> None:
    (folder / "LICENSE").symlink_to(".env")
    with pytest.raises(UserError, match="LICENSE is a link to .*, a file that stays at home"):
        contents(folder)
    (folder / "LICENSE").unlink()
    (folder / "NOTICE.md").write_text("notice")
    (folder / "LICENSE").symlink_to("NOTICE.md")
    (folder / "USE_POLICY.md").write_text("policy")
    assert {"LICENSE", "NOTICE.md", "USE_POLICY.md"} <= contents(folder).files.keys()


RECIPE = {
    "model": {"name": "/mnt/secret/my models/teacher"},
    "data": {"source": "/home/bob/texts/*.parquet", "name": None},
    "evaluation": {"text": "/mnt/s\xe9cret/held.txt", "split": "dev"},
    "stages": [{"data": {"source": "../alice/pairs.jsonl"}}, {"data": {"source": "lab/books"}}],
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /mnt/secret/my models/teacher/config.json now", "see config.json now"),
        ("at /home/bob.", "at ~"),
        ("(/root/.cache/x.json)", "(x.json)"),
        ("`C:\\Users\\bob\\x.txt`", "`x.txt`"),
        ("https://huggingface.co/home/bob/x", "https://huggingface.co/home/bob/x"),
        ("/mnt/secret/my models/teacher2, /usr/bin", "/mnt/secret/my models/teacher2, /usr/bin"),
        ("lab/books, ../alice/pairs.jsonl", "lab/books, pairs.jsonl"),
    ],
)
def test_paths_become_their_last_parts(text: str, shown: str) -> None:
    assert Hider(known_paths(RECIPE), home=Path("/root")).text(text) == shown


def test_published_files_name_no_path_of_this_machine(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("# merged\n" + yaml.safe_dump(RECIPE, width=20))
    block = f"```yaml\n{yaml.safe_dump(RECIPE)}```\n"
    (folder / "README.md").write_text((folder / "README.md").read_text() + block)
    text = "/mnt/s\xe9cret/held.txt"
    student = Measurement(notes=[f"{Path.home()}/a/b.txt is short"])
    report = Report(str(folder), student, "/mnt/t", None, {"text": text}, {})
    report.to_json(folder / "r.json")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    found = publish(contents(folder), folder, "ada/x", adapter_of=None, read_source=False)
    sent = {name: content for name, content in found.files.items() if isinstance(content, bytes)}
    assert sent.keys() == {"README.md", "recipe.yaml", "r.json"} == found.changes.keys()
    for content in sent.values():
        assert not any(part in content.decode() for part in ("/mnt", "cret", "bob", "alice", str(Path.home()) + "/"))
    recipe = yaml.safe_load(sent["recipe.yaml"])
    assert (recipe["model"]["name"], recipe["data"]["source"]) == ("teacher", "*.parquet")
    assert [stage["data"]["source"] for stage in recipe["stages"]] == ["pairs.jsonl", "lab/books"]
    again = json.loads(sent["r.json"])
    assert (again["model"], again["teacher_model"], again["settings"]["text"]) == ("student", "t", "held.txt")
    assert again["student"]["notes"] == ["b.txt is short"]
    assert {path: path.read_bytes() for path in before} == before, "the folder's own files stay"


def test_results_of_a_report_name_its_teacher(folder: Path) -> None:
    student = Measurement(divergence=[Divergence(64, 0.5, 0.25)])
    Report(str(folder), student, "ada/other", None, {"text": "demo", "split": "dev"}, {}).to_json(folder / "r.json")
    found = publish(contents(folder), folder, "ada/x", adapter_of=None, read_source=False)
    card = found.files["README.md"]
    assert isinstance(card, bytes)
    (kl,) = [r for r in ModelCard(card.decode()).data.eval_results or [] if r.metric_value == 0.5]
    assert kl.metric_name == "KL to ada/other at 64 tokens (nats)" and kl.metric_args["teacher"] == "ada/other"


def test_a_dry_run_tells_what_would_change(folder: Path) -> None:
    def report(name: str, loss: float, asked: Asked, time: int) -> None:
        student = Measurement(
            losses=[TextLoss(64, loss, 63, 1, ())], tasks={"piqa": {"acc": 0.75}}, asked={"piqa": asked}
        )
        Report("student", student, None, None, {"text": "demo", "split": "dev"}, {}).to_json(folder / name)
        os.utime(folder / name, (time, time))

    report("a.json", 2.5, Asked(4, 100, 0, own=False), 200)
    report("b.json", 3.5, Asked(100, 100, 0, own=False), 100)
    said: list[str] = []
    push(folder, "ada/x", dry_run=True, say=said.append)
    changes = said[0].partition("README.md is published with these changes; the file here stays as it is:\n")[2]
    assert '  loss 2.5 on demo {"length": 64, "windows": 1}\n' in changes.replace("result: ", "")
    assert "result: acc 0.75 on piqa (only 4 of 100 questions)" in changes and "result: acc 0.75 on piqa {" in changes
    assert "  -# pico, linearized with lolcats\n  +# ada/x: pico, linearized with lolcats\n" in changes
    assert "3.5" not in changes, "the later report counts"
    found = publish(contents(folder), folder, "ada/x", adapter_of=None, read_source=False)
    card = found.files["README.md"]
    assert isinstance(card, bytes)
    results = ModelCard(card.decode()).data.eval_results or []
    assert [(r.metric_type, r.dataset_type) for r in results if r.metric_type == "loss"] == [("loss", "demo")]
    (folder / "README.md").unlink()
    push(folder, "ada/x", dry_run=True, say=said.append)
    assert "no README.md, so the repository gets no model card" in said[1]
