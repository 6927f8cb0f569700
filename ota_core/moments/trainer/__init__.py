"""Second moments in one optimizer's state, as torch saves it: what each optimizer keeps, and under which keys.

``load`` opens the file, ``kinds`` says where an entry holds v, ``refusals`` why one holds none, ``facts`` reads step and β₂, ``names`` gives
numbers their names. ``stored`` reads v in full or in 8 and 4 bits, ``adafactor`` takes row and column means as they are.
"""

from ota_core.moments.trainer.load import open_optimizer, open_state
from ota_core.moments.trainer.moments import TrainerMoments

__all__ = ["TrainerMoments", "open_optimizer", "open_state"]
