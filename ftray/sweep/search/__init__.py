"""Which point next, which trials go on, and populations."""
