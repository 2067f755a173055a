"""Records on disk: written once, opened through a memory map."""
