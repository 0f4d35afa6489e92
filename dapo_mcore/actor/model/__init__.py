"""The policy as Megatron layers: attention, norms, layer specs, and Megatron's configuration.

Change here: how a layer is computed, and the options of Megatron (precision and FP8, recompute levels, fusions).
"""
