"""A static reader of bash: it says which commands a script would run with which words. It runs nothing and reads no environment."""
