"""Base model, chat rendering, attention over packed rows, the multi-adapter layer, adapter files.

Kept empty of imports: torch and transformers load only in the module that needs them.
"""
