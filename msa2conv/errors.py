"""Typed errors. Every message says where, what was found, what was expected and what to do next."""

from __future__ import annotations


class Msa2ConvError(Exception):
    """Base of all errors that msa2conv raises on purpose.

    Args:
        where: module path, file or argument that is at fault.
        found: what was there.
        expected: what would have been accepted.
        hint: what the user can do next, a full sentence.
    """

    def __init__(self, where: str, found: str, expected: str, hint: str) -> None:
        self.where, self.found, self.expected, self.hint = where, found, expected, hint
        super().__init__(f"{where}: found {found}; expected {expected}. {hint}")


class InvalidTarget(Msa2ConvError, ValueError):
    """`flops_target` is not a usable budget."""


class InfeasibleBudget(Msa2ConvError, ValueError):
    """The target lies below what the allowed options can reach."""


class InvalidArgument(Msa2ConvError, ValueError):
    """An argument other than the target is malformed or contradicts another."""


class NoSitesFound(Msa2ConvError, ValueError):
    """No adapter recognised anything that could be converted."""


class ConflictingClaims(Msa2ConvError, ValueError):
    """Two adapters claim the same module."""


class InvalidInput(Msa2ConvError, ValueError):
    """The model cannot run on the example input (image size, channels, type)."""


class InvalidCalibrationData(Msa2ConvError, ValueError):
    """The calibration images are too few, malformed or inconsistent."""


class InvalidTrainingData(Msa2ConvError, ValueError):
    """The training images or labels cannot be used: none, unreadable, or of other classes."""


class SearchNotRun(Msa2ConvError, RuntimeError):
    """A gate search is asked for its result before it has made a step."""


class NonFiniteValue(Msa2ConvError, ValueError):
    """NaN or Inf in the weights, the activations or a loss."""


class UncountedOperator(Msa2ConvError, RuntimeError):
    """The FLOPs counter met an operator that it has no rule for."""


class LayoutMismatch(Msa2ConvError, ValueError):
    """Tokens arrive that do not have the geometry a mixer was made for."""


class UnsupportedArgument(Msa2ConvError, TypeError):
    """A mixer was called with an argument that it cannot honour (a mask, for example)."""


class InvalidPlan(Msa2ConvError, ValueError):
    """A Plan names modules, shapes or attributes that the model does not have or that it may not touch."""


class UnsupportedSchema(Msa2ConvError, ValueError):
    """A file was written by another version of the Plan schema."""


class ArchitectureMismatch(Msa2ConvError, ValueError):
    """A file or Plan belongs to another architecture than the model given."""


class InvalidCheckpoint(Msa2ConvError, ValueError):
    """A file is truncated, is not what it claims to be, or would have to be unpickled."""


class InvalidOutputPath(Msa2ConvError, OSError):
    """An output path cannot be written."""


class MissingDependency(Msa2ConvError, ImportError):
    """An optional package is not installed."""


class WeightsUnavailable(Msa2ConvError, RuntimeError):
    """Pretrained weights could not be had (offline, or none exist)."""


class ExportFailed(Msa2ConvError, RuntimeError):
    """A model cannot be exported, or what was exported answers otherwise."""


class LawViolation(Msa2ConvError, RuntimeError):
    """A guarantee of msa2conv does not hold on this model: a bug, or a model that an adapter misread."""
