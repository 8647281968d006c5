"""A probe in use."""
