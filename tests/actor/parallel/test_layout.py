"""A rank's coordinates, and the collectives of the control group, in real processes. The arithmetic: test_mesh.py."""

from __future__ import annotations

from typing import Any

import torch

from tests.actor import parity
from tests.actor.parity import Mesh


def test_coordinates_of_experts():
    result = parity.spawn(describe_experts, Mesh(tensor=2, data=2, sequence_parallel=True, expert=2))
    # expert tensor varies fastest, then expert, then expert data: tensor pairs share the experts of a layer
    assert result == [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]


def test_coordinates_and_control_collectives():
    result = parity.spawn(describe, Mesh(tensor=2, data=2))
    # Megatron's order: tensor varies fastest, then context, then data
    assert result["coordinates"] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert result["reports"] == 2
    assert (result["sum"], result["maximum"]) == (6.0, 3.0)
    assert result["object"] == {"from": 0}
    assert result["replica"] == [7.0, 8.0]


def describe(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Worker."""
    coordinates = torch.zeros(4, 2, dtype=torch.int64)
    coordinates[layout.rank] = torch.tensor([layout.tensor_rank, layout.data_rank])
    reports = torch.tensor([int(layout.reports_loss)])
    rank = torch.tensor([float(layout.rank)])
    seen = torch.zeros(2)
    for replica, group in enumerate(layout.replica_groups):
        if group is not None:
            value = torch.tensor([7.0 + replica]) if layout.is_controller else torch.zeros(1)
            layout.broadcast(value, group)
            if replica == layout.data_rank and layout.tensor_rank == 1:
                seen[replica] = value
    return {
        "coordinates": layout.sum_over_ranks(coordinates).tolist(),
        "reports": int(layout.sum_over_ranks(reports)),
        "sum": float(layout.sum_over_ranks(rank.clone())),
        "maximum": float(layout.max_over_ranks(rank.clone())),
        "object": layout.broadcast_object({"from": layout.rank}),
        "replica": layout.sum_over_ranks(seen).tolist(),
    }


def describe_experts(layout: Any, mesh: Mesh) -> list[list[int]]:
    """Worker."""
    coordinates = torch.zeros(4, 3, dtype=torch.int64)
    mine = [layout.expert_tensor_rank, layout.expert_rank, layout.expert_data_rank]
    assert layout.expert_group.size() == layout.expert == 2
    assert layout.expert_tensor_group.size() == layout.expert_tensor == 1
    coordinates[layout.rank] = torch.tensor(mine)
    return layout.sum_over_ranks(coordinates).tolist()
