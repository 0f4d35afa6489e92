"""Starting SGLang servers: their command line, model folder and keys, as child processes here or by Ray on other nodes."""
