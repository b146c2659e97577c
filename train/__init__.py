"""Training: from token shards to a trained and evaluated model.

The public name is ``DataOrder``, the sampling order of the training data. Everything else is used
through commands: ``python -m train.launch``, ``torchrun -m train``, ``python -m train.evaluate``.
Importing this package loads no torch.
"""

from train.data.order import DataOrder

__all__ = ["DataOrder"]
