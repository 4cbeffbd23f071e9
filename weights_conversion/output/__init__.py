"""OUT appears complete or not at all: it is put together in OUT.partial and renamed.

The journal says which chunks are on the disk, so that a run that was killed can be continued.
"""
