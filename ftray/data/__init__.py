"""Raw row -> messages -> tokens and mask -> packed rows, in a deterministic order."""
