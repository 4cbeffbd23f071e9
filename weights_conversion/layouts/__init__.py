"""Where a row's tensors lie: which file, which rank, which rows of it; and the plan that binds a source to a target.

Geometry only: a plan knows every name, shape, dtype, file and offset before a byte moves. Nothing here opens a file.
"""
