"""Settings: values of what is chosen for the whole network at once. Inside one, everything is additive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .options import Option

Options = Mapping[str, Sequence[Option]]


@dataclass(frozen=True)
class Setting:
    """One value of what is chosen for the whole network at once, inside which all costs are additive.

    Args:
        scores: what each of its steps costs in accuracy, given the earlier ones.
        flops: multiply-adds that it adds outside all sites; may be negative.
        tokens: {site path: tokens that it sees, prefix tokens included}, where these are not all.
        option: called when the setting is used: what `apply` has to do; None for the network as it is.
        rounds: how often tokens are compared and gathered in each step.
    """

    scores: tuple[float, ...] = ()
    flops: int = 0
    tokens: Mapping[str, int] = field(default_factory=dict)
    option: Callable[[], Option] | None = None
    rounds: tuple[int, ...] = ()


AS_IT_IS = Setting()


@dataclass(frozen=True)
class Limit:
    """A budget that is additive: of FLOPs, or a second one of what is measured, seconds.

    Args:
        of: what an option takes.
        of_setting: what a setting takes outside all sites.
        rest: what the network takes outside all sites.
        most: what may be taken in total.
    """

    of: Callable[[Option], float]
    of_setting: Callable[[Setting], float]
    rest: float
    most: float

    @classmethod
    def in_flops(cls, rest: int, most: int = 0) -> Limit:
        """The budget of multiply-adds."""
        return cls(lambda option: option.flops, lambda setting: setting.flops, rest, most)

    def inside(self, setting: Setting) -> Limit:
        """What is left in a setting."""
        return replace(self, rest=self.rest + self.of_setting(setting))


def inside(setting: Setting, options: Options) -> dict[str, list[Option]]:
    """{site path: what can be done there} in a setting, on its account."""
    return {path: on_tokens(group, setting.tokens.get(path)) for path, group in options.items()}


def on_tokens(options: Iterable[Option], tokens: int | None) -> list[Option]:
    """Those options that run on so many tokens; None: on all."""
    if tokens is None:
        return list(options)
    return [fewer for option in options if (fewer := option.on(tokens)) is not None]


def least_flops(settings: Iterable[Setting], options: Options, rest: int) -> int:
    """Multiply-adds of the cheapest network in any of the settings."""
    return int(least(settings, options, Limit.in_flops(rest)))


def least(settings: Iterable[Setting], options: Options, limit: Limit) -> float:
    """The least that any network takes of a budget, whatever it costs in accuracy."""
    known: dict[tuple[str, int | None], float] = {}

    def of_site(path: str, tokens: int | None) -> float:
        if (path, tokens) not in known:
            known[path, tokens] = min(map(limit.of, on_tokens(options[path], tokens)))
        return known[path, tokens]

    return min(
        limit.inside(setting).rest + sum(of_site(path, setting.tokens.get(path)) for path in options)
        for setting in settings
    )
