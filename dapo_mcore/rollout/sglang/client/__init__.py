"""One SGLang server over HTTP: endpoints, answers, versions."""
