"""DeepSpeed ZeRO: forward and backward, the update, and the sharded state."""
