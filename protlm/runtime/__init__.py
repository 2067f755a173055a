"""Processes, devices, and folders that are locked and appear whole; knows no proteins."""
