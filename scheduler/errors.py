"""The exceptions of the scheduler side, all of them things a client or an operator can cause."""


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""


class ModelSourceError(HeadraceError):
    """MODEL names nothing that can be loaded: not found, not a model, or the demo model could not be fetched."""


class UnsupportedModelError(HeadraceError):
    """The model was found, but its architecture, tensor type or tokenizer is not one this version runs."""


class CapacityError(HeadraceError):
    """The configured sizes do not fit the memory of the device."""


class DeviceLostError(HeadraceError):
    """The device computes nothing any more, whatever it is given; only a new process can have it back."""


class RankError(HeadraceError):
    """A tensor-parallel rank beside this process could not start, or has ended; the message says which and why."""
