"""Teachers and students in and out: architectures, loading, saving, truncation."""
