#!/usr/bin/env python
"""Prove that two checkpoints hold the same model: see `verify.py --help`, or weights_conversion/verify.py."""

from weights_conversion import cli
from weights_conversion.verify import main

if __name__ == "__main__":
    cli.script(main)
