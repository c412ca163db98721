"""Errors a user can cause: each message is one line that says what is wrong, where, and what to do.

Every class also derives from the builtin a Python caller would expect. The `clt` command and the scripts in `launch/`
print the message and exit with code 2; anything else is a defect of ours and keeps its traceback.
"""


class CLTError(Exception):
    """Base of all errors that a user can cause."""


class ConfigError(CLTError, ValueError):
    """A configuration file or override is wrong; the message names the dotted key."""


class ModelError(CLTError, ValueError):
    """A model cannot be loaded, or has no module of the kind asked for."""


class InputError(CLTError, ValueError):
    """An image, dataset or prompt cannot be read."""


class StoreError(CLTError, RuntimeError):
    """An activation store is missing, damaged, or does not match what was asked."""


class NonFiniteError(CLTError, ArithmeticError):
    """An activation, loss or gradient is NaN or infinite."""


class CheckpointError(CLTError, RuntimeError):
    """A transcoder checkpoint is missing, damaged, or belongs to another model or store."""


class GraphError(CLTError, ValueError):
    """An attribution target, graph or graph file is not valid."""


class HubError(CLTError, RuntimeError):
    """A repository of the hub cannot be reached, or does not match the folder on this side."""
