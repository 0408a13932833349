"""A module and its example inputs → what torch's tracers make of it: the neutral graph, an ONNX file."""
