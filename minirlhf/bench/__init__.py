"""Speed beside peers and roofs (rows.py), and memory plans (plan.py)."""
