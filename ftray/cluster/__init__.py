"""Ray for everybody: sessions, resources, probes of nodes, the workers' environment, weights for all nodes."""
