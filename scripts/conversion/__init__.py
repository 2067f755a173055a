"""The experiment of docs/convert.md: its plan, its runs and its page."""
