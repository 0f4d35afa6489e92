"""The policy as Megatron layers: attention, norms, layer specs, and Megatron's configuration."""
