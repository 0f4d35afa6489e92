"""From groups of responses to the tensors of one forward pass: flat batch, micro-batch plan, context-parallel split.

Change here: how samples are divided among gradient steps, ranks and micro-batches, and how a micro-batch is laid out.
"""
