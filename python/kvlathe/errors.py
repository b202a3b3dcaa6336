"""The exceptions of kvlathe: one base class, and one class per kind of cause."""

from __future__ import annotations


class KvlatheError(Exception):
    """Base class of every error that kvlathe raises on purpose."""


class PresetError(KvlatheError, ValueError):
    """A preset file is malformed, or belongs to another model."""


class ShapeError(KvlatheError, ValueError):
    """A tensor has the wrong number of dimensions or the wrong size."""


class DtypeError(KvlatheError, TypeError):
    """A tensor has a dtype that cannot be used here."""


class DeviceError(KvlatheError, RuntimeError):
    """Tensors lie on different devices, or on a device that is not supported."""


class NonFiniteError(KvlatheError, ValueError):
    """A tensor holds NaN or infinity."""


class BlockError(KvlatheError, ValueError):
    """A packed block does not belong where it was given: another preset, layer, side, position or length."""


class ContainerError(KvlatheError, ValueError):
    """The file of a saved cache cannot be written, or is missing, damaged, cut short, newer or something else."""


class PrefixStoreError(KvlatheError, OSError):
    """A store of prefixes cannot be opened, read or written, or what lies in it is damaged."""


class RollbackError(KvlatheError, RuntimeError):
    """Tokens cannot be removed from a cache, because what comes before them is no longer held."""


class CacheStateError(KvlatheError, RuntimeError):
    """Two threads use one cache at once, or a pass through the model was cut short and left the layers unlike."""


class ResourceError(KvlatheError, MemoryError):
    """The system gives no more memory, or no more threads; what was asked for has not been done."""


class PicklingError(KvlatheError, TypeError):
    """Something cannot be pickled, as it lives in native memory; or what was pickled cannot be made again."""


class GradientError(KvlatheError, RuntimeError):
    """A backward pass wants gradients through tokens whose graph a cache has not kept."""


class CalibrationError(KvlatheError, RuntimeError):
    """Calibration cannot give a usable result."""


class BudgetError(KvlatheError, RuntimeError):
    """No setting meets the quality or size budget that was asked for."""


class ModelError(KvlatheError, ValueError):
    """A model cannot be loaded, or is of a kind that is not supported."""


class CorpusError(KvlatheError, ValueError):
    """The text to calibrate on is missing or too short."""


class EvaluationError(KvlatheError, RuntimeError):
    """An evaluation cannot be run, read or drawn as asked."""


class ExpandedWarning(UserWarning):
    """Attention was not served from packed tokens: a cache had to expand them."""


class PrefixStoreWarning(UserWarning):
    """A store of prefixes failed or was slow; generation went on without it."""


class AttachWarning(UserWarning):
    """`attach` has nothing to do for a model."""


class CalibrationWarning(UserWarning):
    """A calibration found something about the model that costs quality."""


class PaddingWarning(UserWarning):
    """Left-padded rows whose first real tokens cannot stay exact."""


class UnverifiedPresetWarning(UserWarning):
    """A preset is used whose quality nobody has measured at its rate."""
