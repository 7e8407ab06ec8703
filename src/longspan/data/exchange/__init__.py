"""Token stores merged and split, taken over from other tools, and handed to them."""
