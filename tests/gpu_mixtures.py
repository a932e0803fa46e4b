"""What both tests of whole steps on a GPU run: shapes of parameters, and arguments by name."""

import pytest
import torch

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SHAPES = [(96, 64), (40,), (16, 8, 3, 3)]
VARIANTS = {
    "defaults": {},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "lamb": {"grafting": "lamb", "weight_decay": 0.1},
    "diagonal": {"large_dim_method": "diagonal"},
    "staggered": {"refresh_schedule": "staggered"},
}
