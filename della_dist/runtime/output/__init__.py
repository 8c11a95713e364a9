"""What becomes of OUT: its files, their records, and going on with them."""
