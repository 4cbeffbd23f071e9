"""Repositories of the Hugging Face hub: which one, which of its files, and what to do when the hub says no.

Everything goes through huggingface_hub's own client and cache.
"""
