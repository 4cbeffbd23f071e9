"""Proves that two checkpoints hold the same model: every value compared, and a forward pass of each side.

The forward pass and the reading of rank files share nothing with the converter.
"""
