"""What a training process wants of its environment; importing this module sets it. It must be imported before torch.

Change here: library settings that are read once, while a library is loaded. Whatever the user has set stays.
"""

import logging
import os
import warnings

# Threads that wait for each other sleep instead of spinning: on a busy machine spinning costs twenty times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# megatron, torch and transformers note the absence of optional packages while they are imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
