"""ModelConfig to and from what files state: config.json, params.json, both Megatrons' args, and the manifest.

Each module reads one spelling and writes it. Which of several statements counts is decided in one place.
"""
