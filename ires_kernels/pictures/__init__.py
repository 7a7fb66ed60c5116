"""What reports and models look like: pictures by matplotlib, and pages that need nothing else."""
