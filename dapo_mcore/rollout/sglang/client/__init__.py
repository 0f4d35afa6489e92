"""One SGLang server over HTTP: its endpoints, its answers, its versions, and the thread that the requests run in."""
