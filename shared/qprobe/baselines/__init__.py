"""The other methods of the paper's tables, on the same samples."""
