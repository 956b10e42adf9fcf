"""`linearize push` against a hub on this machine: what arrives, what is sent twice, what breaks and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import CARD
from huggingface_hub import ModelCard
from loopback import STRANGER, TOKEN, Hub, client_environment
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save_file

from linearize import pipeline
from linearize.cli.main import main
from linearize.errors import UserError
from linearize.evals.measure import Measurement
from linearize.evals.report import Report
from linearize.hf.export import export, export_adapter
from linearize.hub import push as hub_module
from linearize.hub.contents import contents, is_weights
from linearize.hub.published import Published, publish

CLI = "import sys; from linearize.cli.main import main; sys.exit(main(sys.argv[1:]))"
IMPATIENT = "import time; time.sleep = lambda seconds: None; "


class Client:
    """Runs `linearize` in processes that know the hub."""

    def __init__(self, server: Hub, home: Path) -> None:
        self.server, self.home, self.said = server, home, ""
        home.mkdir()

    def __call__(self, *line: object, code: int = 0, before: str = "", **env: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-c", before + CLI, *map(str, line)],
            env=client_environment(self.server, self.home, **env),
            capture_output=True,
            text=True,
            cwd=self.home,
        )
        said = done.stdout + done.stderr
        self.said += said
        assert done.returncode == code, said
        return said


@pytest.fixture
def linearize(server: Hub, tmp_path: Path) -> Client:
    return Client(server, tmp_path / "home")


def published(folder: Path) -> Published:
    return publish(contents(folder), folder, "ada/student", adapter_of=None, read_source=False)


def held(server: Hub, repo: str = "ada/student", branch: str = "main") -> dict[str, bytes]:
    return server.repos[repo].branches[branch]


def test_what_arrives_loads_bit_equal_without_the_toolkit_and_with_it(
    server: Hub, linearize: Client, folder: Path, student: Any, tmp_path: Path
) -> None:
    said = linearize("push", folder, "ada/student")
    assert f"pushed to {server.url}/ada/student" in said
    assert "not sent: .env, .git/, n.txt, own.py, pytorch_model.bin, run/, token" in said
    repo, there = server.repos["ada/student"], held(server)
    assert repo.private and repo.log == ["initial commit", "Upload with linearize"]
    named = {"README.md", "recipe.yaml", "config.json", "generation_config.json", "model.safetensors.index.json"}
    assert named | {"tokenizer.json", "tokenizer_config.json", "modeling_linearized.py"} <= there.keys()
    rest = there.keys() - named - {path for path in there if path.endswith((".py", ".safetensors"))}
    assert rest == {"tokenizer.json", "tokenizer_config.json"} and "own.py" not in there
    assert all(there[path] == (folder / path).read_bytes() for path in there if path != "README.md")
    card = there["README.md"].decode()
    assert "# ada/student: pico, linearized" in card and 'path = "ada/student"' in card and "apache-2.0" in card
    assert (folder / "README.md").read_text() == CARD

    ids = torch.randint(2, 97, (2, 25), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = student(ids).logits
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    script = Path(__file__).parent.parent / "hf" / "clean_process.py"
    env = client_environment(server, tmp_path / "clean")
    line = [sys.executable, "-I", script, tmp_path / "ids.safetensors", tmp_path / "out.safetensors", "ada/student"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["student.logits"], expected)

    ours = (
        "import sys, torch, linearize; from safetensors.torch import load_file, save_file\n"
        "model, tokenizer = linearize.load('ada/student'); ids = load_file(sys.argv[1])['ids']\n"
        "assert type(model).__module__ == 'linearize.hf.auto' and tokenizer('ab').input_ids\n"
        "torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "save_file({'logits': model(ids).logits}, sys.argv[2])\n"
    )
    line = [sys.executable, "-c", ours, tmp_path / "ids.safetensors", tmp_path / "out.safetensors"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], expected)


def test_a_second_push_sends_what_changed_and_deletes_stale_weights(
    server: Hub, linearize: Client, folder: Path, student: Any, pico_tokenizer: Any
) -> None:
    linearize("push", folder, "ada/student")
    first, shards = list(server.uploads), sum(path.endswith(".safetensors") for path in held(server))
    assert len(first) == len(set(first)) == shards > 3
    held(server)["notes.md"] = b"written on the hub"
    server.requests.clear()
    linearize("push", folder, "ada/student")
    assert server.uploads == first and len(server.repos["ada/student"].log) == 2
    assert not any("objects/batch" in path for _, path in server.requests)
    (folder / "recipe.yaml").write_text("model: {name: other}\n")
    linearize("push", folder, "ada/student", "--message", "Another name")
    assert server.uploads == first and server.repos["ada/student"].log[-1] == "Another name"
    assert held(server)["recipe.yaml"] == b"model: {name: other}\n"
    export(student, pico_tokenizer, folder)
    linearize("push", folder, "ada/student")
    weights = [path for path in held(server) if ".safetensors" in path]
    assert weights == ["model.safetensors"] and len(server.uploads) == len(first) + 1
    assert held(server)["notes.md"] == b"written on the hub"


def test_an_interrupted_push_goes_on_where_it_stopped(server: Hub, linearize: Client, folder: Path) -> None:
    server.drop = lambda put: 1000 if put >= 2 else None
    said = linearize("push", folder, "ada/student", code=2, before=IMPATIENT)
    assert "error: the connection to the hub failed" in said and "run the same command again" in said
    before = list(server.uploads)
    assert before and held(server) == {}  # no commit: nobody can load half a checkpoint
    server.drop = lambda put: None
    linearize("push", folder, "ada/student")
    weights = {path for path in folder.glob("*.safetensors")}
    assert len(server.uploads) == len(set(server.uploads)) == len(weights) > len(before)
    assert all(held(server)[path.name] == path.read_bytes() for path in weights)


def test_one_lost_connection_is_tried_again_and_large_files_go_in_parts(
    server: Hub, linearize: Client, folder: Path
) -> None:
    server.part_size, server.drop = 3000, lambda put: 100 if put == 1 else None
    linearize("push", folder, "ada/student", before=IMPATIENT)
    assert server.puts > len(server.uploads) + 1
    assert all(load(held(server)[path.name]) for path in folder.glob("*.safetensors"))


def test_branches_and_who_may_see_it(server: Hub, linearize: Client, folder: Path) -> None:
    said = linearize("push", folder, "lab/student", "--revision", "trial", "--public")
    assert f"pushed to {server.url}/lab/student/tree/trial" in said and "(public), branch trial" in said
    assert not server.repos["lab/student"].private and held(server, "lab/student") == {}
    assert "config.json" in held(server, "lab/student", "trial")
    said = linearize("push", folder, "lab/student", code=2)
    assert "error: lab/student is public, and so would be" in said and "--public" in said
    assert held(server, "lab/student") == {}
    server.add("ada/hidden", {}, private=True)
    linearize("push", folder, "ada/hidden", "--public")
    assert not server.repos["ada/hidden"].private


def test_a_dry_run_needs_neither_network_nor_token(server: Hub, linearize: Client, folder: Path) -> None:
    said = linearize("push", folder, "ada/student", "--dry-run", token=None, HF_HUB_OFFLINE="1")
    size = f"{sum(p.stat().st_size for p in folder.glob('*.py') if p.name == 'swap.py') / 1000:,.1f} KB"
    assert f"swap.py {size:>50}".split() == next(line for line in said.splitlines() if "swap.py" in line).split()
    assert "to ada/student (private)" in said and "pushed" not in said
    assert not server.requests and not server.repos


def test_what_the_hub_refuses(server: Hub, linearize: Client, folder: Path) -> None:
    said = linearize("push", folder, "ada/student", code=2, token="hf_" + "wrong" * 8)
    assert "error: the hub does not know the token" in said and "hf auth login" in said and "wrong" not in said
    said = linearize("push", folder, "ada/student", code=2, token=None)
    assert "error: there is no token" in said and "HF_TOKEN" in said
    said = linearize("push", folder, "ada/student", code=2, token="hf_gehörtNiemand")
    assert "error: the token of the hub has characters" in said and "Niemand" not in said
    said = linearize("push", folder, "eve/student", code=2)
    assert "error: the token belongs to ada, who cannot write to eve/student" in said and "ada, lab" in said
    assert "HF_HUB_OFFLINE is set" in linearize("push", folder, "ada/student", code=2, HF_HUB_OFFLINE="1")
    assert not server.repos
    theirs = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"theirs"}
    server.add("ada/bert", theirs, private=True)
    said = linearize("push", folder, "ada/bert", "--public", code=2)
    assert "error: ada/bert holds a model that linearize did not write" in said
    assert held(server, "ada/bert")["model.safetensors"] == b"theirs"
    assert server.repos["ada/bert"].private, "what is refused does not become public either"
    (folder / "README.md").write_text(CARD.replace("apache-2.0", "All rights reserved!"))
    said = linearize("push", folder, "ada/student", code=2)
    assert "error: the hub does not accept the metadata of README.md" in said and '"license" must be' in said
    assert not server.uploads


def test_an_adapter_alone(
    server: Hub, linearize: Client, student: Any, pico_tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    torch.manual_seed(0)
    lora = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = lora(ids).logits
    usage = 'model = PeftModel.from_pretrained(model, path, subfolder="adapter")\n```\n'
    files = {"README.md": CARD.replace("```\n", usage).replace("```python" + usage[-5:], ""), "recipe.yaml": "a: 1\n"}
    folder = export_adapter(lora, pico_tokenizer, tmp_path / "whole", extra_files=files)
    linearize("push", folder, "ada/whole")
    linearize("push", folder, "ada/lora", "--adapter-only", "--base", "ada/whole")
    expected_files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"}
    assert held(server, "ada/lora").keys() == expected_files
    card = held(server, "ada/lora")["README.md"].decode()
    for told in ("base_model: ada/whole", "base_model_relation: adapter", "library_name: peft", 'path = "ada/whole"'):
        assert told in card
    assert "is a whole checkpoint" in linearize("push", folder, "ada/lora", code=2)
    assert "is an adapter alone" in linearize("push", folder, "ada/whole", "--adapter-only", code=2)
    script = (
        "import sys, torch, linearize; from peft import PeftModel; from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids = torch.arange(2, 40)[None]; torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "whole = linearize.load('ada/whole')[0]; base = AutoModelForCausalLM.from_pretrained('ada/whole')\n"
        "apart = PeftModel.from_pretrained(base, 'ada/lora').eval()\n"
        "save_file({'whole': whole(ids).logits, 'apart': apart(ids).logits}, sys.argv[1])\n"
    )
    out = tmp_path / "out.safetensors"
    env = client_environment(server, linearize.home)
    done = subprocess.run([sys.executable, "-c", script, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(found, expected) for found in load_file(out).values())


def test_folders_and_names_that_cannot_be_pushed(
    folder: Path, pico_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*line: object) -> str:
        assert main(["push", *map(str, line), "--dry-run"]) == 2
        return capsys.readouterr().err

    for name in ("student", "a/b/c", "ada/has space", "/student"):
        assert "is no name of a repository" in refused(folder, name)
    assert "does not exist; give a checkpoint's folder" in refused(tmp_path / "missing", "ada/x")
    assert "has no config.json" in refused(folder / "run", "ada/x")
    pico_model().save_pretrained(tmp_path / "source")
    assert "linearize did not write" in refused(tmp_path / "source", "ada/x")
    assert "has no adapter/ with a LoRA" in refused(folder, "ada/x", "--adapter-only")
    assert "it needs adapter_only" in refused(folder, "ada/x", "--base", "ada/y")
    (folder / "recipe.yaml").write_text(f"model:\n  name: https://ada:{STRANGER}@example.org\n")
    said = refused(folder, "ada/x")
    assert "recipe.yaml, line 2, has a token of the hub in it" in said and STRANGER not in said
    assert "the message has a token" in refused(folder, "ada/x", "--message", STRANGER)
    assert "is no name of a branch" in refused(folder, "ada/x", "--revision", "../main")
    assert "is no branch" in refused(folder, "ada/x", "--revision", "refs/pr/1")
    for content in (b"", b"just a text", b"a: [", b"\xff\xfe"):
        (folder / "recipe.yaml").write_bytes(content)
        said = refused(folder, "ada/x")
        assert "recipe.yaml" in said and ("remove it" in said)
    (folder / "recipe.yaml").write_text("model:\n  name: demo\n")
    config = (folder / "config.json").read_text()
    for content in ("{", "[]", ""):
        (folder / "config.json").write_text(content)
        assert "config.json is damaged" in refused(folder, "ada/x")
    (folder / "config.json").write_text(config)
    (folder / "recipe.yaml").unlink()
    (folder / "README.md").write_bytes(b"# Un mod\xe8le\n")
    assert "README.md is not UTF-8 (line 1); save it as UTF-8" in refused(folder, "ada/x")
    (folder / "README.md").write_bytes(b"---\nmodel-index: 3\n---\n")
    assert "the metadata at the top of README.md cannot be read" in refused(folder, "ada/x")
    (folder / "README.md").unlink()
    report = dict.fromkeys(("student", "teacher", "settings", "environment"), 1)
    (folder / "r.json").write_text(json.dumps({"model": "student", **report}))
    assert "r.json looks like a report of `linearize evaluate`" in refused(folder, "ada/x")
    (folder / "r.json").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../.ssh/id_rsa")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is no safetensors file beside it" in refused(folder, "ada/x")
    (folder / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is damaged" in refused(folder, "ada/x")
    (folder / "model.safetensors.index.json").unlink()
    assert "pickled weights (.bin), which are never read" in refused(folder, "ada/x")


def test_a_report_beside_the_checkpoint_goes_along_and_into_the_card(folder: Path) -> None:
    student = Measurement(tasks={"copa": {"acc": 0.75}})
    Report("student", student, None, None, {"text": None, "split": "dev"}, {}).to_json(folder / "copa.json")
    (folder / "notes.json").write_text('{"student": 1}')
    said: list[str] = []
    hub_module.push(folder, "ada/student", dry_run=True, say=said.append)
    assert "copa.json" in said[0].partition("not sent")[0] and "notes.json" in said[0].partition("not sent")[2]
    assert "acc 0.75 on copa" in said[0]
    card = published(folder).files["README.md"]
    assert isinstance(card, bytes)
    Report("demo", student, None, None, {}, {}).to_json(folder / "base.json")
    assert "base.json" in contents(folder).left_out, "it is about another model"
    (result,) = ModelCard(card.decode()).data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("copa", "acc", 0.75)


def test_no_token_is_ever_shown_or_written(server: Hub, linearize: Client, folder: Path, tmp_path: Path) -> None:
    loud = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    linearize("doctor", "--online", **loud)
    linearize("push", folder, "ada/student", **loud)
    linearize("push", folder, "eve/student", code=2, **loud)
    broken = "import linearize.hub.push; linearize.hub.push._operations = None; "
    assert "Traceback" in linearize("push", folder, "ada/broken", code=1, before=broken, **loud)
    server.drop = lambda put: 10
    server.blobs.clear()
    linearize("push", folder, "ada/dropped", code=2, before=IMPATIENT, **loud)
    (folder / "recipe.yaml").write_text(f"token: {TOKEN}\n")
    assert "has a token of the hub in it" in linearize("push", folder, "ada/student", code=2, **loud)
    assert "curl" in linearize.said and "<TOKEN>" in linearize.said  # the library did tell its requests
    assert TOKEN not in linearize.said and TOKEN[:20] not in linearize.said
    written = [path for path in linearize.home.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    pushed = [content for repo in server.repos.values() for content in repo.branches["main"].values()]
    assert pushed and not any(TOKEN.encode() in content for content in [*pushed, *server.blobs.values()])
    assert not any(TOKEN in text for text in server.headers)


def test_convert_looks_at_the_hub_first_and_pushes_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[object] = []
    monkeypatch.setattr(hub_module, "reserve", lambda repo: done.append(("reserve", repo)))
    monkeypatch.setattr(pipeline, "convert", lambda *_, **__: done.append("convert") or Path("out"))
    monkeypatch.setattr(hub_module, "push", lambda folder, repo: done.append((folder, repo)) or "there")
    line = ["convert", "--model", "demo", "--recipe", "lolcats", "--push-to-hub", "ada/student"]
    assert main(line) == 0 and "pushed to there" in capsys.readouterr().out
    assert done == [("reserve", "ada/student"), "convert", (Path("out"), "ada/student")]

    def fail(*_: object) -> str:
        raise UserError("no network")

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_module, "push", interrupt)
    assert main(line) == 130
    assert "The checkpoint is complete; push it with: linearize push out ada/student" in capsys.readouterr().err
    done.clear()
    assert main([*line, "layers=LLLLS"]) == 2 and not done, "a recipe that does not fit leaves no repository"
    assert main([*line, f"data.source=https://{STRANGER}@x/a.txt"]) == 2 and not done
    said = capsys.readouterr().err
    assert "the recipe has a token of the hub in it" in said and STRANGER not in said

    monkeypatch.setattr(hub_module, "push", fail)
    assert main(line) == 2
    assert "no network. The checkpoint is complete; push it with: linearize push out ada/s" in capsys.readouterr().err


def test_convert_refuses_before_training(
    server: Hub, linearize: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["convert", "--model", "demo", "--recipe", "lolcats", "-o", str(tmp_path / "out"), "--push-to-hub"]
    assert main([*line, "student"]) == 2 and "is no name of a repository" in capsys.readouterr().err
    assert "does not know the token" in linearize(*line, "ada/student", code=2, token="hf_" + "wrong" * 8)
    assert not (tmp_path / "out").exists() and not server.repos


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("model.safetensors", True),
        ("model-00002-of-00003.safetensors", True),
        ("model.safetensors.index.json", True),
        ("adapter/adapter_model.safetensors", True),
        ("adapter_model.safetensors", True),
        ("model_ema.safetensors", False),
        ("models/backup/weights.safetensors", False),
        ("modelfiles/optimizer.safetensors", False),
        ("adapter/other/adapter_model.safetensors", False),
    ],
)
def test_only_what_a_push_left_may_be_deleted(path: str, ours: bool) -> None:
    assert is_weights(path) == ours
