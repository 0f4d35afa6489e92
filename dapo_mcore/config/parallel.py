"""The section `parallel`: the process mesh.

Change here: what a user may set about the mesh, and its default. Which meshes fit a model is in actor/parallel/mesh.py.
"""

from __future__ import annotations

from pydantic import Field

from dapo_mcore.config.values import Count, Section


class ParallelConfig(Section):
    """The process mesh. World size = tensor · pipeline · context · data; data is what remains.

    The experts of an MoE model have their own mesh over the same processes: world size = expert_tensor · expert ·
    pipeline · expert data, where expert data is what remains.
    """

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    context_parallel: Count = 1
    data_parallel: Count | None = None
    """Only a check: when given, the world size must be exactly the product."""
    expert_parallel: Count = 1
    """Ranks over which the experts of a layer are distributed."""
    expert_tensor_parallel: Count | None = None
    """Ranks that share one expert. None: tensor_parallel while expert_parallel is 1, else 1 (whole experts)."""
    sequence_parallel: bool = False
    timeout_minutes: int = Field(240, ge=1, le=30 * 1440)
    """Collectives wait this long: it must outlast the longest rollout."""
    check_replicas: bool = True
    """Compare checksums of the weights that several ranks hold, after the gradient steps of every rollout step; a
    difference ends the run."""

    @property
    def expert_tensor_size(self) -> int:
        """expert_tensor_parallel with its default filled in."""
        return self.expert_tensor_parallel or (self.tensor_parallel if self.expert_parallel == 1 else 1)
