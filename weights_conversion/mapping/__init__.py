"""What a model's parameters are on both sides: rows, ops as pairs of views, and dialects.

A row is one parameter with its names, shape, cut and op. Both directions of a conversion read the same row. Nothing
here opens a file.
"""
