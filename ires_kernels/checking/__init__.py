"""What must be true before a merge, meanwhile and after it: guards, verification."""
