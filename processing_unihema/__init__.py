"""Images and text in, results out."""
