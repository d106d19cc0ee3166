"""What an endpoint measures and logs of itself: Prometheus metrics, the access log, traces."""
