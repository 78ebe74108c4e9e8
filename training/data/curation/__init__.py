"""Data before training: unpacked, converted, checked, compared, licensed."""
