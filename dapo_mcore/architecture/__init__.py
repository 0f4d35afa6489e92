"""What a Hugging Face model is, in Megatron's terms: its family, sizes, config fields and weights. Pure: no files, no processes.

Change here: the models that are supported. To add one, start with the table FAMILIES in families.py.
"""
