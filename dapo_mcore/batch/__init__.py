"""From groups of responses to what one forward pass reads: flat batch, plan, context-parallel split, micro-batch."""
