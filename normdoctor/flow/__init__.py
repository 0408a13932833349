"""What moves through the graph of a network: the neutral graph, and affine maps carried along it."""
