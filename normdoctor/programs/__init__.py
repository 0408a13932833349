"""Exported programs and TorchScript as modules of Python, whose norms can be stopped at."""
