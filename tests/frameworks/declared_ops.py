"""Lets torchvision be imported where its library does not suit torch, say one without CUDA.

timm and models of transformers import it, and nothing here computes with it. Import this first.
"""

import torch

try:
    import torchvision
except RuntimeError:  # it gives a fake to operators that its library has not brought
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
