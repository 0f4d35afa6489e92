"""Environment variables and logging of a training process. Importing this module sets them; import it before torch.

Change here: library settings that are read once, while a library is loaded. A value that the user has set stays.
"""

import logging
import os
import warnings

# Threads that wait for each other sleep instead of spinning: on a busy machine spinning costs twenty times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# During import, megatron, torch and transformers warn about each optional package that is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
