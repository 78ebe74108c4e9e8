"""Data of training: catalog, readers, schema rows, preparing, checking, augmentation, mixing and synthetic smears."""
