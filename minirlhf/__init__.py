"""RLHF for language models, small enough to read: README.md is the way in."""
