"""The version of this package, kept here as to ask the installed one takes longer than a short command."""

VERSION = "0.2.0"
