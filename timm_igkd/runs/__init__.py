"""One run: its settings, stages and folder."""
