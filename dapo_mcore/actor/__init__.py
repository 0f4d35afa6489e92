"""The trained policy on Megatron-core: one rank's part of the model, its gradient steps, its optimizer, its weight stream.

Change here: how the policy is scored, trained and exported. model/ builds the layers, parallel/ the process groups.
"""

from dapo_mcore.actor.parallel import megatron_jit

megatron_jit.replace()
