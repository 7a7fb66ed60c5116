"""Durable bytes, and no numbers: opening, owners, locks, low-level writes, the undo journal, the workplace."""
