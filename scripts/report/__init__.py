"""Behind `scripts/attention_report.py`: closed forms, measurements, the sections made of them, and their page."""
