"""Conversion of model folders between Hugging Face and Megatron, restartable and verified. The command is tools/convert.py.

Change here: what is converted, and what is compared.
"""
