"""Models that torch runs → ONNX files with their norms kept."""
