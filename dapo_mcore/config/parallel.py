"""The section `parallel`: the process mesh.

Change here: what a user may set about the mesh, and its default. Which meshes fit a model is in actor/parallel/mesh.py.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from dapo_mcore.config.values import Count, Section


class ParallelConfig(Section):
    """The process mesh. World size = tensor · pipeline · context · data; data is what remains.

    The experts of an MoE model have their own mesh over the same processes: world size = expert_tensor · expert ·
    pipeline · expert data, where expert data is what remains.
    """

    tensor_parallel: Count = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_parallel: Count = 1
    """Stages of consecutive layers (PP)."""
    virtual_pipeline_parallel: Count = 1
    """Chunks of layers per pipeline stage. More than 1 interleaves them: the time that stages wait at the start and end of a
    gradient step shrinks by this factor, but each micro-batch is sent between stages as many times more, and a stage keeps the
    activations of more micro-batches. The number of micro-batches becomes a multiple of pipeline_parallel. Not yet measured on a
    GPU."""
    context_parallel: Count = 1
    """Ranks that share each sequence (CP)."""
    data_parallel: Count | None = None
    """Only a check: when given, the world size must be exactly the product."""
    expert_parallel: Count = 1
    """Ranks over which the experts of a layer are distributed."""
    expert_tensor_parallel: Count | None = None
    """Ranks that share one expert. None: tensor_parallel while expert_parallel is 1, else 1 (whole experts)."""
    sequence_parallel: bool = False
    """Split activations between the layers' matrices over the TP ranks, too."""
    timeout_minutes: int = Field(240, ge=1, le=30 * 1440)
    """Collectives wait this long: it must outlast the longest rollout."""
    hang_minutes: float | None = Field(30, gt=0, le=1440)
    """End a job that torchrun has started once a rank gets no further for this long within a gradient step or a weight sync: the stacks
    of all ranks and the rank at fault are told, and torchrun's --max-restarts can start it again. Twice as long at the start and
    in a save, four times between two finished responses. A rank that only waits for others never counts. A stopped or lost
    process ends the job after a minute. Costs a small process per node. At most timeout_minutes. null: only timeout_minutes ends a
    hang."""
    check_replicas: bool = True
    """Compare checksums of the weights that several ranks hold, after the gradient steps of every rollout step; a
    difference ends the run."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data- and context-parallel ranks in buckets, each as soon as the backward pass of the gradient step's last
    micro-batch is through with it, instead of all of them after that pass. Hides up to 4 bytes of communication per parameter,
    once per gradient step. The first step of a run does not overlap, and pipeline stages after the first have one bucket.
    The gradient norm, and sums over three and more ranks, are rounded in another order than without buckets. Not yet measured on a
    GPU."""
    overlap_param_gather: bool = False
    """Gather the parameters that a gradient step has updated beside the forward pass of the next gradient step of the same rollout
    step, instead of before it. Hides up to 4 bytes per parameter in fp32, 2 in bf16; changes no number. Needs
    overlap_grad_reduce and optimizer.distributed, and helps only with several gradient steps per rollout step. Not yet
    measured on a GPU."""
    bucket_size: Count | None = None
    """Parameters per bucket of overlap_grad_reduce. Smaller buckets start earlier, but their messages are less efficient. null takes
    Megatron's: 40 million, or a million per data- and context-parallel rank if that is more."""

    @property
    def expert_tensor_size(self) -> int:
        """expert_tensor_parallel with its default filled in."""
        return self.expert_tensor_parallel or (self.tensor_parallel if self.expert_parallel == 1 else 1)

    @property
    def virtual_pipeline_size(self) -> int | None:
        """virtual_pipeline_parallel as Megatron wants it: None without interleaving."""
        return self.virtual_pipeline_parallel if self.virtual_pipeline_parallel > 1 else None

    @property
    def num_chunks(self) -> int:
        """Chunks into which pipeline stages cut the model's layers."""
        return self.pipeline_parallel * self.virtual_pipeline_parallel

    @property
    def micro_batch_multiple(self) -> int:
        """Divides the number of micro-batches of a gradient step: an interleaved schedule passes them on in groups."""
        return self.pipeline_parallel if self.virtual_pipeline_size else 1

    @model_validator(mode="after")
    def _check_hang(self) -> ParallelConfig:
        if self.hang_minutes is not None and self.hang_minutes > self.timeout_minutes:
            raise ValueError(
                f"hang_minutes {self.hang_minutes:g} is above timeout_minutes {self.timeout_minutes}, so the collectives' time-out would "
                f"end a hang first, without stacks and the rank at fault; set hang_minutes to at most {self.timeout_minutes} or null, "
                "or raise timeout_minutes"
            )
        return self

    @model_validator(mode="after")
    def _check_overlap(self) -> ParallelConfig:
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError(
                "overlap_param_gather gathers the buckets of overlap_grad_reduce, which is false; set overlap_grad_reduce true"
            )
        if self.bucket_size is not None and not self.overlap_grad_reduce:
            raise ValueError(
                f"bucket_size {self.bucket_size} has no effect without overlap_grad_reduce: all gradients are then summed at "
                "once; set overlap_grad_reduce true, or leave bucket_size out"
            )
        return self

    @model_validator(mode="after")
    def _check_chunks(self) -> ParallelConfig:
        if self.virtual_pipeline_parallel > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"virtual_pipeline_parallel {self.virtual_pipeline_parallel} interleaves the chunks of several pipeline stages, "
                f"but pipeline_parallel is 1; raise pipeline_parallel, or leave virtual_pipeline_parallel out"
            )
        return self
