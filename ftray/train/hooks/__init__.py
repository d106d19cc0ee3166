"""What a worker does beside the steps: records, samples, profiles, watches itself."""
