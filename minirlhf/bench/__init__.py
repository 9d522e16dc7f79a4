"""Speed beside peers and roofs, and memory plans."""
