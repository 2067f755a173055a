"""The work of protlm, command by command: plain arguments in, a report dataclass out, no printing."""
