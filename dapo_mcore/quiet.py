"""Importing this module hides the notes of megatron, torch and transformers about absent optional packages.

It must be imported before them: they warn while they are imported.
"""

import logging
import os
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
