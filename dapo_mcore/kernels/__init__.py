"""GPU kernels and the same operations in PyTorch: `policy_head`, `policy_loss`, `swiglu` and `fp8_quant`.

Change here: nothing. The packages are in the folder `kernels/` of the repository and are installed under this name. In a
checkout that is not installed, `__path__` finds that folder.
The packages import torch, and Triton if it is installed, but nothing else of dapo_mcore: they can be used alone.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
