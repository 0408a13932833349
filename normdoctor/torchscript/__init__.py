"""TorchScript: a frozen graph of aten operators → the neutral graph, and a fold plan back into it."""
