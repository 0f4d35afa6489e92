"""The Megatron side: the policy, its mesh of processes, its forward and gradient steps."""
