"""A whole run: its stages in order, what it needs beforehand, what it says at the end."""
