"""Parts of `scripts/paper_table.py`."""
