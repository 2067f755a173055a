"""Records on disk: written once, read through memory maps."""
