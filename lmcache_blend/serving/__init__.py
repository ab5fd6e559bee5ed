"""vLLM: the KV connector, its settings, and what starts a server. Importing this package needs no vLLM."""
