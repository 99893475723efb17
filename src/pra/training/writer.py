"""torch's writer of distributed checkpoints, on the GPU of its process."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter


class Writer(HuggingFaceStorageWriter):
    """Writes this process's tensors, in the safetensors format.

    torch writes in a new thread, whose current GPU is the first one, and looks for its stream there: on a machine of 8
    GPUs seven processes would open a context on the first, some hundred MB each. ``device`` is None on a CPU.
    """

    def __init__(self, folder: str, device: torch.device | None) -> None:
        super().__init__(folder, save_distributed=True)
        self.device = device

    # torch calls this first in its thread, and looks for "kwargs" by name.
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin, in the thread that will write."""
        if self.device is not None:
            torch.cuda.set_device(self.device)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
