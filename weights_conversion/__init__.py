"""Converts checkpoints between Hugging Face and Megatron without Megatron, CUDA, or a process group."""

__version__ = "1.0.0"
