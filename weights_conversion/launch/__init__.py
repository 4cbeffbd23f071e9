"""Many processes on one conversion, as torchrun or srun starts them: who they are, how they meet, how they end.

Weights move through the filesystem; only short values cross the network.
"""
