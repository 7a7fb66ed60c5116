"""Models that are in memory already, as modules of torch: what they hold, merged in place, and taken back."""
