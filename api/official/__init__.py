"""The authors' research checkpoint: converting it, and proving that outputs are equal."""
