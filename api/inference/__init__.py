"""Faster forms of a trained model: prepared for inference, exported to ONNX, in 8 bit."""
