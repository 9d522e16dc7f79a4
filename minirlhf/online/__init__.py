"""A policy's own samples against one another."""
