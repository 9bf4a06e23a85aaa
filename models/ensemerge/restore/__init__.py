"""What weights alone cannot carry over: the statistics that a network gathered about its own activations."""
