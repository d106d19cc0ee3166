"""One engine with its adapters, as a Ray Serve replica holds it."""
