"""The contract's own code: initial values seeded by name, and configs built from plain data."""

import pytest
import torch
from torch import nn

from linearize.hf.auto import find_class
from linearize.inits.base import Constant, Identity, Init, Normal
from linearize.mixers.base import HeadShape, Mixer, config_from_dict
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.parts.feature_maps.hedgehog import HedgehogConfig


class Toy(Mixer):
    """Two parameters with random values, one without."""

    def __init__(self, swap_order: bool = False):
        super().__init__(None, HeadShape(2, 1, 4, 4, 8, scale=0.5))
        names = ["gate", "decay", "eye"]
        for name in reversed(names) if swap_order else names:
            self.register_parameter(name, nn.Parameter(torch.empty(2, 4, 4)))

    def inits(self) -> dict[str, Init]:
        return {"gate": Normal(0.5), "decay": Normal(0.5), "eye": Identity()}


def values(mixer: Mixer, name: str = "layers.0.mixer", seed: int = 0) -> dict[str, torch.Tensor]:
    mixer.initialise(name, seed)
    return {key: parameter.detach().clone() for key, parameter in mixer.named_parameters()}


def test_random_values_depend_on_name_and_seed_and_not_on_order():
    first = values(Toy())
    torch.manual_seed(7)
    again = values(Toy(swap_order=True))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["gate"], first["decay"])
    for other in (values(Toy(), name="layers.1.mixer"), values(Toy(), seed=1)):
        assert not torch.equal(other["gate"], first["gate"])
        assert torch.equal(other["eye"], torch.eye(4).expand(2, 4, 4))
    assert 0.3 < float(torch.cat([first["gate"], first["decay"]]).std()) < 0.7


def test_inits_say_what_they_do():
    assert [str(x) for x in (Constant(0.25), Identity(), Normal(0.02))] == [
        "constant 0.25",
        "identity per head",
        "normal, std 0.02",
    ]


def test_configs_are_built_from_nested_plain_data():
    config = config_from_dict(LolcatsConfig, {"window": 8, "feature_map": {"dim": 4}}, find_class)
    assert config == LolcatsConfig(window=8, feature_map=HedgehogConfig(dim=4))
    with pytest.raises(ValueError, match="unknown key 'windw'; did you mean 'window'"):
        config_from_dict(LolcatsConfig, {"windw": 8}, find_class)
    with pytest.raises(ValueError, match="unknown key 'feature_map.dims'; did you mean 'dim'"):
        config_from_dict(LolcatsConfig, {"feature_map": {"dims": 4}}, find_class)
