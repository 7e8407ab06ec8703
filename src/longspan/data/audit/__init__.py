"""What is in token stores: duplicates, repetition, boilerplate, languages; nothing is rewritten."""
