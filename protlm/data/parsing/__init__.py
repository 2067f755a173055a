"""Text, whatever its format, to records."""
