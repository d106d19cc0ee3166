"""Inference: the Engine protocol and the torch engine (scheduler, paged KV cache, sampler, many adapters)."""
