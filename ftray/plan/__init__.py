"""`ftray plan`: memory, time and cost of a run before a GPU is touched."""
