"""Text itself: sentences of any script, facts planted in them, and the corpus that every Python carries."""
