"""catode: prune residual networks by the ordinary differential equations of their gates.

The package root imports nothing heavy. The mathematics lives in `catode.theory` (numpy and scipy only), the trainer in
`catode.train` (PyTorch).
"""

__version__ = "0.1.0"
