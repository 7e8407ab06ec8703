"""What CEPE trains on: windows of an encoder and a decoder, and the corpus for its retrieval."""
