"""Data of training: readers, schema rows, augmentation, data sets, mixing and synthetic smears."""
