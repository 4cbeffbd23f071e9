"""Opens every kind of checkpoint, and finds each row of a model in it.

Headers and args are read, no data. What is missing, misshapen, stored twice or too many is an error.
"""
