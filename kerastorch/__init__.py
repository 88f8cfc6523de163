"""kerastorch: the Keras one-liners for any torch.nn.Module."""

from . import backends as backends
from . import callbacks as callbacks
from . import schedules as schedules
from .averages import average_checkpoints as average_checkpoints
from .callbacks import Callback as Callback
from .debugging import debug_nan as debug_nan
from .history import History as History
from .model import Model as Model
from .seeding import set_seed as set_seed

__version__ = "0.1.0"
