"""Correcting results by hand: the log of what a person changed, the page that shows them, and data to learn from."""
