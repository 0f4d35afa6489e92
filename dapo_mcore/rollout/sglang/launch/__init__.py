"""Starting SGLang servers here or by Ray, and what each must show before it is used."""
