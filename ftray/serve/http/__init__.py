"""The endpoint's HTTP side: application, ingress, embeddings, the playground and its page."""
