"""Mode connectivity: what lies between two networks."""
