"""The verbs: each opens, plans, checks and runs one kind of conversion, and does nothing else."""
