"""ftray: fine-tuning of language models on Ray, from a base model to a live, measured, swappable adapter."""

__version__ = "0.1.0"
