"""One of two executors: writes a merge to a new folder."""
