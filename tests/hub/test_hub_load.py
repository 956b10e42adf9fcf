"""Loading and evaluating from a hub: revisions, gated and private repositories, offline, and what messages say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from loopback import STRANGER, Hub, client_environment

from linearize.hf.export import export

SCRIPT = """
import json, sys
import linearize
from linearize.errors import UserError
from linearize.evals.evaluate import _recipe
from linearize.hub.card_data import source_metadata

def outcome(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except UserError as error:
        return f"UserError: {error}"

told = {}
for case in json.loads(sys.argv[1]):
    name, revision = case
    found = outcome(linearize.load, name, revision=revision)
    told[f"load {name} {revision}"] = found if isinstance(found, str) else type(found[0]).__name__
    told[f"recipe {name}"] = outcome(_recipe, name)
    told[f"card {name}"] = source_metadata(name)
print("\\n" + json.dumps(told))
"""
CARD = b"---\nlicense: other\nlicense_name: pico-licence\nlicense_link: LICENSE\nlanguage: [en, de]\n---\n"


def ask(server: Hub, home: Path, *cases: tuple[str, str | None], **env: Any) -> dict[str, Any]:
    environment = client_environment(server, home, **env)
    line = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}


def test_loading_from_a_hub(converted: Any, pico_tokenizer: Any, tmp_path: Path) -> None:
    folder = export(converted("lolcats", "LSL"), pico_tokenizer, tmp_path / "m", extra_files={"recipe.yaml": "a: 1\n"})
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": CARD}
    bare = {name: content for name, content in files.items() if name != "recipe.yaml"}
    with Hub() as server:
        server.add("ada/mine", files, private=True).branches["trial"] = bare
        server.add("ada/gated", files, gated=True)
        cases = [("ada/mine", "trial"), ("ada/mine", "nope"), ("ada/mine", None)]
        own = ask(server, tmp_path / "home", *cases)
        other = ask(server, tmp_path / "other", ("ada/mine", None), ("ada/gated", None), token=STRANGER)
        server.requests.clear()
        offline = ask(server, tmp_path / "home", ("ada/mine", None), ("ada/gated", None), HF_HUB_OFFLINE="1")
        assert not server.requests
    cut = ask(server, tmp_path / "home", ("ada/mine", None), ("ada/never", None))
    student = "LinearizedLlamaForCausalLM"
    assert cut["load ada/mine None"] == student and cut["recipe ada/mine"] == {"a": 1} and cut["card ada/mine"]
    assert f"the hub at {server.url} does not answer" in cut["load ada/never None"] and cut["card ada/never"] == {}
    assert "path of a local copy" in cut["load ada/never None"] and "Retrying" not in cut["said"]
    assert own["load ada/mine trial"] == own["load ada/mine None"] == student
    assert "it has no such revision" in own["load ada/mine nope"]
    assert own["recipe ada/mine"] == {"a": 1}
    link = "https://huggingface.co/ada/mine/blob/main/LICENSE"
    licence = {"license": "other", "license_name": "pico-licence", "license_link": link}
    assert own["card ada/mine"] == {**licence, "language": ["en", "de"]}
    assert "none of this name, or it is private and the token here may not see it" in other["load ada/mine None"]
    assert "it is gated, and the token here has no access" in other["load ada/gated None"]
    assert "UserError" in other["recipe ada/mine"] and other["card ada/gated"] == {}
    assert offline["load ada/mine None"] == student and offline["recipe ada/mine"] == {"a": 1}
    assert "HF_HUB_OFFLINE is set and it is not in the local cache" in offline["load ada/gated None"]
    assert offline["recipe ada/gated"] == {} and "not known whether it has recipe.yaml" in offline["said"]
    assert STRANGER not in other["said"] + json.dumps(other)
