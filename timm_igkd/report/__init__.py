"""What a run tells people: its page, its card, its push."""
