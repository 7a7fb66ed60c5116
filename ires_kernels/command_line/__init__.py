"""The command line: its arguments, what commands print, how failures and signals end them."""
