"""Nets are trained for a few steps here."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # for tensors this small more threads only wait for each other
