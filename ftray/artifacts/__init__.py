"""What runs leave and start from: adapters published to the registry, and `init_from` resolved."""
