"""`compare`: the choices of one key, each at its own best point, measured against each other."""
