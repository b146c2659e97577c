"""Training: token shards and a model become a trained, evaluated model.

The public name is ``DataOrder``, the order in which training sees the data. The rest is reached
through commands: ``python -m train.launch``, ``torchrun -m train``, ``python -m train.evaluate``.
Importing this package loads no torch.
"""

from train.data.order import DataOrder

__all__ = ["DataOrder"]
