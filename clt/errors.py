"""Errors that a user can cause. Each message is one line: the problem, where it is, and the remedy.

Every class also derives from the builtin that a Python caller would expect. The `clt` command and the scripts in
`launch/` print the message and exit with code 2; other exceptions are bugs and keep their traceback.
"""


class CLTError(Exception):
    """Base of all errors that a user can cause."""


class ConfigError(CLTError, ValueError):
    """A configuration file or override is wrong; the message names the dotted key."""


class ModelError(CLTError, ValueError):
    """A model cannot be loaded, or lacks a required module."""


class InputError(CLTError, ValueError):
    """An image, dataset or prompt cannot be read."""


class StoreError(CLTError, RuntimeError):
    """An activation store is missing, damaged, or does not match the request."""


class NonFiniteError(CLTError, ArithmeticError):
    """An activation, loss or gradient is NaN or infinite."""


class CheckpointError(CLTError, RuntimeError):
    """A transcoder checkpoint is missing, damaged, or belongs to another model or store."""


class GraphError(CLTError, ValueError):
    """An attribution target, graph or graph file is not valid."""


class HubError(CLTError, RuntimeError):
    """A hub repository cannot be reached, or does not match the local folder."""
