"""Paths that others know too."""

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ANSWERING = (CHAT, COMPLETIONS, EMBEDDINGS)  # what metrics and traces count
