"""Checkpoints of torch.distributed.checkpoint (DCP), as FSDP writes them: read without a process group, by ranges, without torch."""

from ota_core.files.dcp.folder import DcpFolder
from ota_core.files.dcp.metadata import METADATA, DcpTensor

__all__ = ["METADATA", "DcpFolder", "DcpTensor"]
