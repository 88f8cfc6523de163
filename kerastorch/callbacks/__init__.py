"""What may happen beside the training: base class and ready-made callbacks."""

from .averaging import EMA as EMA
from .averaging import StochasticWeightAveraging as StochasticWeightAveraging
from .base import Callback as Callback
from .loggers import CSVLogger as CSVLogger
from .loggers import MLflowLogger as MLflowLogger
from .loggers import WandbLogger as WandbLogger
from .progress import ProgressBar as ProgressBar
from .tensorboard import TensorBoard as TensorBoard
from .transfer import Unfreeze as Unfreeze
