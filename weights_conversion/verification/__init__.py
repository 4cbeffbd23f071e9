"""Proves that two checkpoints hold the same model: every value compared, and a forward pass of each side.

The forward pass, its rope and its conventions share nothing with the converter but `ModelConfig`. Rank files are put
together, and HF folders and torch_dist checkpoints are read, by rules of their own. Shared with the converter are how
the configs are read, the rows that the exact comparison goes by, the headers of rank files and Meta's files.
"""
