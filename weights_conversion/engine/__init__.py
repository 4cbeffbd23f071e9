"""Runs a plan: threads read, convert and write chunks within a bounded amount of memory.

The same engine serves both directions and every format. It knows no family.
"""
