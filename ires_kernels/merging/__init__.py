"""Whole checkpoints: open, plan, stream, and keep the result only if everything went well."""
