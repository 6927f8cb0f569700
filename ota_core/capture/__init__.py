"""Second moments kept while a model is trained: a callback for the Trainer, a function for any other loop.

Only torch is needed to import this; saving needs numpy and pydantic, too, which every trainer brings along.
"""

from ota_core.capture.callback import SecondMomentsCallback
from ota_core.capture.save import save_second_moments

__all__ = ["SecondMomentsCallback", "save_second_moments"]
