"""Judges at work: labels from them, measurements of them, comparisons of systems by them."""
