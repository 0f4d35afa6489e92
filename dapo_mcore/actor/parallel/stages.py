"""How a model's layers are spread over pipeline stages.

Change here: which stages get one layer more. This module imports nothing, so a run can be planned before it starts.
"""

from __future__ import annotations


def split_layers(num_layers: int, stages: int) -> list[int]:
    """Return the number of layers of each pipeline stage.

    If the layers do not divide evenly, the middle stages get one more, later ones first because they hold fewer micro-batches;
    then the first stage. The last stage, with the policy head, never does.
    """
    order = [*range(stages - 2, 0, -1), 0, stages - 1]
    extra = order[: num_layers % stages]
    return [num_layers // stages + (stage in extra) for stage in range(stages)]
