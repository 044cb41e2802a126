"""What papers have measured, measured again: a file for each table or claim."""
