"""Honest measurement: exact match and held-out loss, offline through the engine and through the endpoint."""
