"""The embedded engine: scheduler, paged KV cache, sampler, decoder, many adapters in one forward pass."""
