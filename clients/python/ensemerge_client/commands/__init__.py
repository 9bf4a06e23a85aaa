"""The client's commands in the shell."""
