"""The command line: options in, one workflow call, a report out."""
