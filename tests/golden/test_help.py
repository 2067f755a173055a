from scripts.make_golden import HELP_DIR, help_texts


def test_help_is_the_text_that_was_reviewed():
    """After a wanted change: python scripts/make_golden.py --only-help."""
    assert help_texts() == {path.name: path.read_text(encoding="utf-8") for path in HELP_DIR.iterdir()}
