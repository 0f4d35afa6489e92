"""GPU kernels and their PyTorch references, one package an operation: `policy_head`, `policy_loss`.

Change nothing here: the packages live in the folder `kernels/` at the top of the repository and are installed under this
name. In a bare checkout, which nobody installed, that folder is found through `__path__`.
They import torch (and Triton where it is there) and nothing of dapo_mcore, so that they can be lifted out.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
