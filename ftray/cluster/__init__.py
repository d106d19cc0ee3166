"""The machine and the cluster: `ftray doctor`."""
