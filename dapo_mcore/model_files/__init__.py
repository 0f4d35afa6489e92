"""Model folders on disk: Hugging Face's and Megatron's, and their file formats. Knows no running model.

Change here: how a folder or a file format is read and written.
"""
