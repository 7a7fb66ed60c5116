"""What is written down and told: commands, provenance, history, reports, states."""
