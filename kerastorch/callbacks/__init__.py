"""What may happen beside the training: base class and ready-made callbacks."""

from .averaging import EMA as EMA
from .averaging import StochasticWeightAveraging as StochasticWeightAveraging
from .backup import BackupAndRestore as BackupAndRestore
from .base import Callback as Callback
from .checkpoint import ModelCheckpoint as ModelCheckpoint
from .functions import LambdaCallback as LambdaCallback
from .loggers import CSVLogger as CSVLogger
from .loggers import MLflowLogger as MLflowLogger
from .loggers import WandbLogger as WandbLogger
from .measuring import DeviceStats as DeviceStats
from .measuring import GradNorm as GradNorm
from .measuring import Timer as Timer
from .monitoring import Monitoring as Monitoring
from .predictions import Predictions as Predictions
from .profiler import Profiler as Profiler
from .progress import ProgressBar as ProgressBar
from .schedules import LearningRateScheduler as LearningRateScheduler
from .schedules import ReduceLROnPlateau as ReduceLROnPlateau
from .stopping import EarlyStopping as EarlyStopping
from .stopping import TerminateOnNaN as TerminateOnNaN
from .tensorboard import TensorBoard as TensorBoard
from .throughput import Throughput as Throughput
from .transfer import Unfreeze as Unfreeze
