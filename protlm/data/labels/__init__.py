"""Clusters, families and splits that files assign to ids."""
