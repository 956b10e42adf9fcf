"""Makes converted models known to Hugging Face's Auto classes, and turns loaded source models into them.

`register()` runs by itself when `linearize` has been imported and an Auto class is used (see
`linearize.hf.hook`); after it `AutoModelForCausalLM.from_pretrained` loads every converted checkpoint without
`trust_remote_code`. Whatever these classes save, with `save_pretrained` or through a trainer, carries the
code to load it without the toolkit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any

from linearize import registry
from linearize.families.base import Family
from linearize.hf.bundle import auto_map, bundle
from linearize.hf.modeling import build_classes
from linearize.kept import kept_of
from linearize.swap import mixer_specs, swap_layers, swapped

_trusted: ContextVar[bool] = ContextVar("linearize_trusted", default=False)


@contextmanager
def trusting(trusted: bool) -> Iterator[None]:
    """Inside the context, `trusted` says whether checkpoints may name mixers whose modules have to be imported."""
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def find_class(package: str, key: str) -> type:
    """The class of a mixer ("mixers") or of a part (such as "mixers.parts.decays") that a checkpoint's config names.

    Raises:
        UserError: for an unknown key, and outside `trusting(True)` for `module:Class` of a module that nobody has
            imported; see `registry.find`.
    """
    return registry.find_class(package, key, trusted=_trusted.get())


@cache
def classes(model_type: str) -> tuple[type, type]:
    """The (config class, model class) of converted models whose source has this `model_type`, say "llama".

    Raises:
        UserError: for an architecture without a family file.
    """
    family = registry.find("families", model_type, Family)
    config_class, model_class = build_classes(family, find_class, __name__)
    model_class.save_pretrained = _saves_code(model_class.save_pretrained, model_type)  # type: ignore[attr-defined]
    return config_class, model_class


def __getattr__(name: str) -> type:
    """The classes that this module makes, under their names, as pickle looks for them."""
    if name.startswith("Linearized"):
        for key in registry.keys("families"):
            for cls in classes(key):
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _saves_code(save: Any, model_type: str) -> Any:
    @wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        files = bundle(self.config)
        self.config.auto_map = auto_map(model_type)
        save(self, save_directory, *args, **kwargs)
        for name, text in files.items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")

    return save_pretrained


@cache
def register() -> None:
    """Register the classes of every family with the Auto classes; later calls do nothing."""
    import transformers

    for key in registry.keys("families"):
        config_class, model_class = classes(key)
        transformers.AutoConfig.register(config_class.model_type, config_class)  # type: ignore[attr-defined]
        auto: Any = getattr(transformers, registry.find("families", key, Family).auto_class)
        auto.register(config_class, model_class)


def linearized(model: Any, description: Mapping[str, Any]) -> Any:
    """Turn a loaded source model, in place, into its converted class and put its mixers in.

    Every tensor of the source stays the same object under the same name. The mixers' new parameters have the
    model's dtype and their layer's device, and no values yet: call `Mixer.initialise` on each.

    Args:
        model: an instance of a family's model class, on any device.
        description: what the config will say, see `linearize.swap.mixer_specs`.

    Returns:
        The same `model`.

    Raises:
        UserError: for an unknown family or mixer.
        ValueError: for settings that the mixer rejects.
    """
    register()  # so that the Auto classes know the model's config from now on
    family = registry.family_of(model.config)
    config_class, model_class = classes(model.config.model_type)
    with trusting(True):  # the description comes from a recipe, not from a checkpoint
        specs = mixer_specs(description, find_class)
    found: type = type(model)
    assert found is family.model_class, f"{found} is not {family.model_class}"
    model.__class__ = model_class
    model.config.__class__ = config_class
    model.config.linearize = dict(description)
    swap_layers(model, family, specs, kept_of(description))
    for attn in swapped(model).values():
        own = (p for n, p in attn.named_parameters() if not n.startswith("mixer."))
        attn.mixer.to(device=next(own).device, dtype=model.dtype)
    return model
