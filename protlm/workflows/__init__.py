"""What protlm does: plain arguments in, a report dataclass out, no printing."""
