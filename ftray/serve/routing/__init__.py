"""Which version a model name means, which replica has it, and canaries."""
