"""The engine over vLLM: what it is told, and its outputs as our events."""
