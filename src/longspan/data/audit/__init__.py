"""What is in token stores or raw input: duplicates, repetition, boilerplate, languages; nothing is rewritten."""
