"""Second moments in checkpoints of DeepSpeed: ZeRO stages 0 to 3, and its universal format."""

from ota_core.moments.deepspeed.folder import find_deepspeed, is_deepspeed, open_deepspeed, rank_files

__all__ = ["find_deepspeed", "is_deepspeed", "open_deepspeed", "rank_files"]
