"""The executor that updates a model's own files."""
