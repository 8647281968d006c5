"""What the user meets: commands, configurations, own prompts and rewards."""
