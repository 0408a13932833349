"""Small nets run here, forward alone."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # for tensors this small more threads only wait for each other
