"""The model card of a converted checkpoint: what it is, how to load it, what was measured, and its recipe.

Every number comes from the run's own measurements; without any, the card says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from linearize import __version__
from linearize.architecture import architecture
from linearize.evals.measure import Measurement
from linearize.evals.table import comparison_table
from linearize.families.base import Family
from linearize.hub.card_data import PLACE, card_data
from linearize.hub.card_results import remarks
from linearize.plan import Plan
from linearize.recipe import Recipe
from linearize.registry import find


def model_card(recipe: Recipe, plan: Plan, measurements: Mapping[str, Measurement]) -> str:
    """README.md of the checkpoint.

    Args:
        recipe: the resolved recipe.
        plan: what was swapped.
        measurements: name of the point ("teacher", "untrained", "after finetune") -> what was measured there.
    """
    source = recipe.resolved_model()
    local = Path(source).expanduser().exists()
    swapped = sum(layer.mixer is not None for layer in plan.layers)
    name = Path(recipe.model.name).name if local else source
    measured = _measured(measurements) if measurements else "Nothing was measured for this checkpoint."
    kept = bool(recipe.stages) and recipe.stages[-1].get("lora") and not recipe.stages[-1]["lora"]["merge"]
    adapter = 'model = PeftModel.from_pretrained(model, path, subfolder="adapter")  # as measured\n' if kept else ""
    peft = "from peft import PeftModel\n" if kept else ""
    what_it_is, short, long = architecture(plan.mixer), plan.cache_bytes(2048) / 2**20, plan.cache_bytes(131072) / 2**20
    trained = any("tokens" in stage for stage in recipe.stages)
    how = " and trained to take over from it," if trained else ", untrained,"
    sizes = f"{short:,.2f} MiB after 2,048 tokens and {long:,.2f} MiB after 131,072."
    cache = f" The decoding cache of a sequence takes\n{sizes}" if plan.causal else ""
    auto = find("families", plan.family, Family).auto_class
    remote = "" if plan.native else ", trust_remote_code=True"
    alone = "  # with `import linearize`: not needed" if remote else ""
    native = (
        f"\nIt is a `{plan.native}` model of transformers and loads without `trust_remote_code`.\n"
        if plan.native
        else ""
    )
    return f"""---
{card_data(recipe, plan, measurements, auto).to_yaml()}
---

# {name}, linearized with {_method(recipe, what_it_is)}

{swapped} of {len(plan.layers)} attention layers of `{name}` were replaced by {_replacement(plan, what_it_is)}{how}
with linearize {__version__}.{cache}
{native}
## Use

```python
{peft}from transformers import {auto}, AutoTokenizer

{PLACE}
model = {auto}.from_pretrained(path{remote}){alone}
tokenizer = AutoTokenizer.from_pretrained(path{remote})
{adapter}```

## Measured

Losses are nats per token, gaps the loss above the teacher's; "off": with one branch of the mixers off.
Settings: `evaluation` in `recipe.yaml`.

{measured}

## Recipe

{_repeated(recipe, local)}

All its settings, as in `recipe.yaml`:

```yaml
{recipe.to_yaml().strip()}
```
"""


def _method(recipe: Recipe, what_it_is: str) -> str:
    """What the title names: a shipped recipe of another name than its mixer's, and what the mixer is."""
    named = recipe.origin.stem
    return what_it_is if named in (None, recipe.mixer["type"]) else f"recipe {named} ({what_it_is})"


def _replacement(plan: Plan, what_it_is: str) -> str:
    """What stands where attention stood, in a sentence."""
    key = plan.mixer["type"]
    return f"the `{key}` mixer" + ("" if what_it_is == key else f" (here: {what_it_is})")


def _measured(measurements: Mapping[str, Measurement]) -> str:
    """The table, and which tasks in it were not asked as the benchmark is."""
    asked = {task: how for m in measurements.values() for task, how in m.asked.items()}
    notes = [f"- {task}: {'; '.join(said)}." for task, how in asked.items() if (said := remarks(how))]
    return "\n\n".join([comparison_table(list(measurements.items())), *(["\n".join(notes)] if notes else [])])


def _repeated(recipe: Recipe, local: bool) -> str:
    """Which recipe it was, and the command that follows it again."""
    origin = recipe.origin
    model = ["--model", Path(recipe.model.name).name if local else recipe.model.name]
    if origin.shipped:
        what = f"`{origin.name}` of linearize {__version__}"
        line = [*model, "--recipe", str(origin.name), *origin.overrides]
    else:
        what = f"The author's own{f', `{origin.name}`' if origin.name else ''}, for linearize {__version__}"
        line = [*(model if local else []), "--recipe", "recipe.yaml"]
    changes = f", with `{' '.join(origin.overrides)}`" if origin.overrides else ""
    where = f"; `{model[1]}` is the source model's folder" if local and recipe.model.name != "demo" else ""
    return f"{what}{changes}. To follow it again{where}:\n\n```sh\n{shlex.join(['linearize', 'convert', *line])}\n```"
