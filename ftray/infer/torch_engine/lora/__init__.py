"""Many adapters in one batch: the bank of slots, their layout, and how a batch uses them."""
