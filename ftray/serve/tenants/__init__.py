"""Who asks, and what they may: keys, the usage ledger, rates and budgets."""
