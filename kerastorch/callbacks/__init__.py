"""What may happen beside the training: base class and ready-made callbacks."""

from .averaging import EMA as EMA
from .averaging import StochasticWeightAveraging as StochasticWeightAveraging
from .base import Callback as Callback
from .measuring import DeviceStats as DeviceStats
from .measuring import GradNorm as GradNorm
from .measuring import Timer as Timer
from .predictions import Predictions as Predictions
from .profiler import Profiler as Profiler
from .progress import ProgressBar as ProgressBar
from .throughput import Throughput as Throughput
from .transfer import Unfreeze as Unfreeze
