"""Machinery that could serve any training of a GPT: README.md tells what is where."""
