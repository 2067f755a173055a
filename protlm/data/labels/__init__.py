"""Clusters, families and splits that files tell."""
