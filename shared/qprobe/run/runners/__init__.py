"""Where stages run: here in one process, later elsewhere. A stage is a callable from a batch to its rows."""
