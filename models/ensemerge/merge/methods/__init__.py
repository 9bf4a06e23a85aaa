"""Merge methods: pure functions on tensors in the field's notation, and the method objects that run them in blocks."""
