"""What a Hugging Face model is, in Megatron's terms: families, shapes, the table of parameters. Change here: a new family of models."""
