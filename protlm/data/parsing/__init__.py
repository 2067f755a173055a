"""From protein files of any supported format to records."""
