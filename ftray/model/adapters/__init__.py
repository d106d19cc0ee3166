"""Adapters: trained and written (lora.py, fused_lora.py), as plain PEFT directories (directory.py), read back for
serving (weights.py), merged into their base (merge.py)."""
