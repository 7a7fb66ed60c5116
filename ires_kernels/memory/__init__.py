"""Models as tensors that are the pages of their files."""
