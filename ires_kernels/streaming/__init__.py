"""Tiles of bytes to a processor, on the CPU or a GPU, and back to bytes."""
