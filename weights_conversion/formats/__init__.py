"""Bytes in files: torch archives, torch_dist, safetensors. Each module reads and writes one format.

Places of tensors are found without reading data; files are laid out before their data exist.
"""
