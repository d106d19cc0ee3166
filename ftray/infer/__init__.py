"""Inference: the Engine protocol, what all engines share, and the engines (`torch_engine/`, `vllm_engine/`)."""
