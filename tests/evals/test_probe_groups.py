"""Groups of probes, with and without settings."""

import pytest

from linearize.errors import UserError
from linearize.evals.probe_groups import GROUPS, ungrouped
from linearize.evals.probes.base import probe_of


def test_a_group_is_its_probes_each_once():
    assert ungrouped(["recall", "mqar", "gates"]) == [*GROUPS["recall"], "gates"]
    assert GROUPS.keys().isdisjoint(name for names in GROUPS.values() for name in names)


def test_settings_of_a_group_are_those_of_its_probes():
    found = ungrouped([{"type": "long", "lengths": [64], "items": 3}])
    assert [probe["type"] for probe in found] == list(GROUPS["long"])
    assert all((probe_of(probe).config.lengths, probe_of(probe).config.items) == ([64], 3) for probe in found)
    with pytest.raises(UserError, match=r"unknown key 'probes.pears'"):
        [probe_of(probe) for probe in ungrouped([{"type": "recall", "pears": 3}])]
