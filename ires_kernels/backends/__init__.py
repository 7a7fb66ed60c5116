"""The arithmetic: one definition of it, its kernels, and which of them a call gets."""
