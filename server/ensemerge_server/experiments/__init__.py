"""Experiments: one name, several arms. Who gets which arm, and how arms with different outputs give one answer."""
