"""Second moments in checkpoints of torch.distributed.checkpoint (DCP): FSDP 1 and 2, torchtitan, OLMo-core."""

from ota_core.moments.dcp.folder import dcp_files, find_dcp, is_dcp, open_dcp

__all__ = ["dcp_files", "find_dcp", "is_dcp", "open_dcp"]
