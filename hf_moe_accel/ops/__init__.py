"""Primitives, and the one file a vendor is imported by."""
