"""Test helpers: ranks (a pool of worker processes), tiny models, and the table of tolerances."""
