"""Training state on disk or in a store: written beside the training, verified, exported."""
