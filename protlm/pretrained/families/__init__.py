"""Families of foreign checkpoints: how each names its tensors, and which settings it has."""
