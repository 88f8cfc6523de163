"""What may happen beside the training: base class and ready-made callbacks."""

from .averaging import EMA as EMA
from .averaging import StochasticWeightAveraging as StochasticWeightAveraging
from .base import Callback as Callback
from .checkpoint import ModelCheckpoint as ModelCheckpoint
from .progress import ProgressBar as ProgressBar
from .transfer import Unfreeze as Unfreeze
