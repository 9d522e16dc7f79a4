"""Machinery without a word of RLHF."""
