"""Parts of `scripts/learning.py`."""
