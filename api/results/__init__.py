"""What an analysis found: the result, its files and pictures, and how far the image is from those of the training."""
