"""What people look at: a table in the terminal, plots, and a page in one file."""
