from __future__ import annotations

import pytest

from dapo_mcore.actor.parallel.stages import split_layers


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (4, 2, [2, 2]),
        (5, 2, [3, 2]),
        (7, 4, [2, 2, 2, 1]),
        (6, 4, [1, 2, 2, 1]),
        (5, 4, [1, 1, 2, 1]),
        (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_layers_that_do_not_divide_are_spread_with_light_ends(layers, stages, expected):
    assert split_layers(layers, stages) == expected
