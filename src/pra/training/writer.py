"""torch's writer of distributed checkpoints, at home on the GPU of its process."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class Writer(HuggingFaceStorageWriter):
    """Writes what this process has of the tensors, in the safetensors format.

    torch writes in a new thread, whose current GPU is the first whatever that of the process is, and looks for its
    stream there: on a machine of 8 GPUs seven processes would open a context on the first one, some hundred MB each.

    Args:
        folder: where to.
        device: the process's GPU with its number; None where it has none.
    """

    def __init__(self, folder: str, device: torch.device | None) -> None:
        super().__init__(folder, save_distributed=True)
        self.device = device

    # torch calls this first in its thread, and looks for "kwargs" by name.
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begins, in the thread that will write."""
        self._take_device()
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this process's part."""
        self._take_device()
        return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Ends, in the process that coordinates."""
        self._take_device()
        super().finish(metadata, results)

    def _take_device(self) -> None:
        if self.device is not None:
            torch.cuda.set_device(self.device)
