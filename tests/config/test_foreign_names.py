"""Foreign names lead to keys of ours that exist."""

from __future__ import annotations

import pytest

from dapo_mcore.config.foreign_names import DIALECTS, Name
from dapo_mcore.config.keys import kind_of


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_name_leads_to_a_key(dialect: str) -> None:
    ours = {key for name in DIALECTS[dialect].values() for key in name.keys}
    assert sorted(key for key in ours if kind_of(key.split(".")) is None) == []


def test_several_keys_of_one_name() -> None:
    assert Name("optimizer.beta1, optimizer.beta2").keys == ("optimizer.beta1", "optimizer.beta2")
