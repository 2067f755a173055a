"""Pages for people and programs that show results: self-contained HTML with figures, and tables for MultiQC."""
