"""The Python API: what `import ftray` offers, a module for each thing that one does with it."""
