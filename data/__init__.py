"""Data sets: they read images, make the low-quality input and cut aligned patches."""
