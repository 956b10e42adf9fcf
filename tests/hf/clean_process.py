"""Run as a script: loads exported folders where only torch and transformers can be imported, and writes what
they say.

    python -I clean_process.py IDS.safetensors OUT.safetensors FOLDER...

A FOLDER may be the hub name of a causal LM. Remote code is trusted where there is any. For each, OUT holds
`<name>.logits` of the ids and `<name>.greedy`, their greedy continuation.
"""

import importlib.abc
import importlib.util
import json
import pickle
import sys
from pathlib import Path

CAUSAL = "AutoModelForCausalLM"
BLOCKED = {"linearize", "fla", "peft", "pydantic", "accelerate", "triton", "outside_mixer"}


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)


def find_spec(name: str, package: str | None = None, real=importlib.util.find_spec):
    return None if name.partition(".")[0] in BLOCKED else real(name, package)


sys.meta_path.insert(0, Blocker())
importlib.util.find_spec = find_spec  # transformers asks it what is installed

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
ids_file, out_file, *folders = sys.argv[1:]
ids = load_file(ids_file)["ids"]
results = {}
for folder in folders:
    config = Path(folder) / "config.json"
    classes = json.loads(config.read_text()).get("auto_map", {}) if config.exists() else {CAUSAL: ""}
    auto = getattr(transformers, next((name for name in classes if name != "AutoConfig"), CAUSAL))
    model = auto.from_pretrained(folder, **({"trust_remote_code": True} if classes else {}))
    transformers.AutoTokenizer.from_pretrained(folder)
    name = Path(folder).name
    model = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        results[f"{name}.logits"] = model(ids)[0]
    if not model.can_generate():
        continue
    mask = torch.ones_like(ids)
    results[f"{name}.greedy"] = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
assert not BLOCKED & {module.partition(".")[0] for module in sys.modules}
save_file(results, out_file)
