"""The endpoint: an OpenAI-compatible ingress, engine replicas, and adapters that load on demand, on Ray Serve."""
