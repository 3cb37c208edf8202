"""The door: commands, their arguments and exit codes."""
