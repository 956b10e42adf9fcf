"""Writes the tables of docs/mixers.md, between its markers, from the code itself; `make docs` runs it.

Mixers, parts and recurrences are found as recipes find them, so a new file of any appears without a change here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import linearize.ops
from linearize.fake_run import state_bytes
from linearize.mixers.base import Context, HeadShape, Mixer
from linearize.mixers.composed import ComposedConfig
from linearize.mixers.parts.base import Part
from linearize.ops.recurrence import Recurrence
from linearize.registry import find, keys

PAGE = Path(__file__).parent / "mixers.md"
LLAMA_3_8B = HeadShape(heads=32, kv_heads=8, key_dim=128, value_dim=128, hidden_size=4096, scale=128**-0.5)
SYMBOLS = {"Hq": 303, "Hkv": 101, "K": 1009, "V": 1013, "(K + V)": 2022}
"""Sizes of a layer that no product of other sizes in a state equals, to read its formula off the shapes."""


def render(page: str) -> str:
    """The page with its tables as the code is now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}{table()}{end}{rest.split(end, 1)[1]}"
    return page


def presets() -> list[tuple[str, type[Mixer]]]:
    """(key, class) of every mixer but the composed one, which they are made of."""
    return [(key, find("mixers", key, Mixer)) for key in keys("mixers") if key != "composed"]  # type: ignore[type-abstract]


def story(mixer: type[Mixer]) -> tuple[str, str, str]:
    """Paper, what the mixer is, and its first trap, from the docstring of its file: its first arXiv id, its first
    sentence, and the clause after "Traps:".
    """
    text = " ".join((inspect.getdoc(inspect.getmodule(mixer)) or "").split("\n\n"))
    text = " ".join(text.split())
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", text)
    traps = re.search(r"Traps?: (.*?)(?:[;:(]|\.(?: |$))", text)
    what = (inspect.getdoc(inspect.getmodule(mixer)) or "").partition("\n\n")[0]
    link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "–"
    return link, " ".join(what.split()).rstrip("."), traps[1].strip() if traps else "–"


def _catalogue() -> str:
    rows = []
    for key, mixer in presets():
        paper, what, trap = story(mixer)
        rows.append([f"`{key}`", paper, what, trap])
    return _table(["mixer", "paper", "what it is", "trap"], rows)


def _parts() -> str:
    header = [
        "mixer",
        "feature map",
        "decay",
        "update",
        "read-out",
        "window, combination",
        "positions",
        "before the map",
    ]
    return _table([*header, "output"], [[f"`{key}`", *_choices(mixer.Config())] for key, mixer in presets()])


def _choices(config: Any) -> list[str]:
    """What a config chooses on each axis of the algebra; mixers with code of their own have settings of their own."""
    base = ComposedConfig()

    def get(name: str) -> Any:
        return getattr(config, name, None if name in ("decay", "update") else getattr(base, name))

    names = {field.name for field in dataclasses.fields(config)}
    shared = get("window") and get("combine").part.shares_denominator
    read = ["/ sum with the window's" if shared else "/ sum of weights"] * bool(get("normalize") or shared)
    read += ["/ √F"] * (get("scale") == "sqrt") + ["+ skip"] * get("skip")
    window = [str(get("window")), _part(get("combine"))] if get("window") else []
    window += [f"{get(name)} {name.replace('_', ' ')}" for name in ("sinks", "meta_tokens") if get(name)]
    window += [
        f"{name}: {getattr(config, name)}" for name in sorted(names - {f.name for f in dataclasses.fields(base)})
    ]
    before = [f"convolution {get('conv').size} of {get('conv').inputs}"] if get("conv").size else []
    before += [f"{get('qk_norm')} norm"] * (get("qk_norm") != "none")
    before += ["heads cloned"] * (get("kv_heads") == "cloned")
    out, rank = get("output"), get("output").gate_rank
    output = [f"{out.norm} norm"] * (out.norm != "none")
    output += [f"{out.gate} gate" + (f" of rank {rank}" if rank else "")] * (out.gate != "none")
    output += ["scale"] * out.scale
    decay = "–" if get("decay") is None else _part(get("decay"))
    update = "code of its own" if get("update") is None else _part(get("update"))
    columns = [_part(get("feature_map")), decay, update]
    return [*columns, *(", ".join(x) or "–" for x in (read, window, [get("rope")], before, output))]


def _part(config: Any) -> str:
    """A part's name, with its settings that are not its own defaults in brackets."""
    default = type(config)()
    fields = [field.name for field in dataclasses.fields(config) if field.name != "type"]
    changed = {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(default, name)}
    inner = ", ".join(name if value is True else str(value) for name, value in changed.items())
    return f"{config.type}({inner})" if inner else config.type


def _states() -> str:
    rows = []
    for key, mixer in presets():
        with FakeTensorMode(), bfloat16():
            held = state_bytes(mixer(mixer.Config(), LLAMA_3_8B), LLAMA_3_8B, torch.bfloat16)
        rows.append([f"`{key}`", formula(mixer), f"{held / 1024:,.0f}"])
    return _table(["mixer", "numbers in the state of a layer", "KiB, Llama 3 8B"], rows, right=1)


@contextmanager
def bfloat16() -> Iterator[None]:
    """Parameters made inside the context are bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def formula(mixer: type[Mixer]) -> str:
    """How many numbers the state of one sequence holds, in the sizes of the layer; flags and counters are left out."""
    terms: Counter[tuple[str, ...]] = Counter()
    for shape in state_shapes(mixer):
        count, symbols = 1, []
        for size in shape:
            name = next((name for name, unit in SYMBOLS.items() if size % unit == 0 and size // unit <= 64), None)
            count *= size if name is None else size // SYMBOLS[name]
            symbols += [] if name is None else [name]
        terms[tuple(symbols)] += count
    written: list[str] = []
    for symbols, count in sorted(terms.items(), key=lambda term: -len(term[0])):
        if not terms[symbols]:
            continue
        *rest, last = symbols
        for other, shown in (((*rest, "V"), f"({last} + V)"), (tuple(rest), f"({last} + 1)")):
            if other != symbols and terms[other] == count:
                terms[other], last = 0, shown
                break
        written.append(" ".join([*([f"{count:,}"] if count > 1 else []), *rest, last]))
    return " + ".join(written)


def state_shapes(mixer: type[Mixer]) -> list[tuple[int, ...]]:
    """Shapes of the floating-point tensors of a state without their batch, in a layer of the sizes of `SYMBOLS`."""
    heads, kv_heads, key_dim, value_dim, _ = SYMBOLS.values()
    with FakeTensorMode():
        try:
            module = mixer(mixer.Config(), HeadShape(heads, kv_heads, key_dim, value_dim, 64, 1.0))
        except ValueError:  # keys and values have to have one size
            value_dim = key_dim
            module = mixer(mixer.Config(), HeadShape(heads, kv_heads, key_dim, value_dim, 64, 1.0))
        sizes = [(heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim), (64,)]
        q, k, v, x = (torch.empty(1, 2, *size) for size in sizes)
        _, state = module(q, k, v, x, Context(lambda q, k: (q, k)))
        return [tuple(leaf.shape[1:]) for leaf in tree_leaves(state) if leaf.is_floating_point()]


def recurrences() -> dict[str, Recurrence]:
    """Every recurrence of `linearize.ops`, by its module."""
    found = {}
    for info in pkgutil.iter_modules(linearize.ops.__path__, "linearize.ops."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, Recurrence) and _is_from(getattr(module, value.name, None), info.name):
                found[info.name] = value
    return found


def _recurrences() -> str:
    updates = {key: inspect.getmodule(find("mixers.parts.updates", key, Part)) for key in keys("mixers.parts.updates")}
    rows = []
    for name, op in recurrences().items():
        users = [key for key, module in updates.items() if any(_is_from(x, name) for x in vars(module).values())]
        step = "as naive" if op.step is op.naive else "yes"
        kernel = "–" if op.kernel is None else "yes" if op.obstacle is None else "with conditions"
        packed = "resets of the decay" if op.resets else "a row each"
        rows.append([f"`{op.name}`", ", ".join(users), "yes", "yes", step, kernel, packed])
    return _table(["recurrence", "updates", "naive", "chunk", "step", "fla kernel", "packed documents"], rows)


def _is_from(value: Any, module: str) -> bool:
    return inspect.isfunction(value) and value.__module__ == module


def _table(header: list[str], rows: list[list[str]], right: int = 0) -> str:
    lines = [header, [*["---"] * (len(header) - right), *["---:"] * right], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


TABLES = {"catalogue": _catalogue, "parts": _parts, "states": _states, "recurrences": _recurrences}

if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
