"""The process groups: tensor, pipeline, context, expert and data parallel. Only here is Megatron's parallel state read."""
