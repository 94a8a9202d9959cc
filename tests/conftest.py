import os

import torch

# Triton reads this once, at its import: without a GPU its kernels run in its interpreter, wherever a test module sits
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
