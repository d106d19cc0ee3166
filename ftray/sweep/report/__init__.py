"""A sweep in words, plots and one HTML page."""
