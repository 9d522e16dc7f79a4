"""Who prefers, and how they say it."""
