"""The faults of the soak: their kinds, the places where they strike, and how they are drawn."""

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

# For each place: the largest number of the visit that is struck, and which rank may wait there.
PLACES: dict[str, tuple[int, str]] = {
    "start": (1, "any"),
    "process group": (1, "any"),
    "claim": (1, "main"),
    "find start": (1, "any"),
    "load": (1, "any"),
    "warm-up": (1, "any"),
    "step": (40, "any"),
    "update": (40, "any"),
    "validation": (6, "any"),
    "save": (4, "any"),
    "writing": (4, "any"),
    "commit": (4, "main"),
    "committed": (4, "main"),
    "purge": (4, "main"),
    "deleting": (2, "main"),
    "leaving": (1, "any"),
}
# Places of the saving thread, for which the loop does not wait; for the second list, only if saves are asynchronous.
BESIDE_THE_LOOP = ("purge", "deleting")
BESIDE_THE_LOOP_IF_ASYNC = ("save", "writing", "commit")
ASYNC_SAVES = ("--save.mode", "async")
SHARDED = ("--parallel.mode", "fsdp")  # on two processes, bit for bit what DDP trains
RESTART_PLACES = ("start", "process group", "claim", "find start", "load", "warm-up")

KILLS = ("kill rank", "kill ranks", "kill everything")
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP, "SIGUSR1": signal.SIGUSR1}
STOPS = {  # kind: the reason in status.json
    "SIGTERM launcher": "SIGTERM",
    "SIGINT launcher": "SIGINT",
    "SIGHUP launcher": "SIGHUP",
    "SIGTERM rank": "SIGTERM",
    "SIGUSR1 rank": "SIGUSR1",
    "STOP file": "STOP file",
    "kill launcher": "launcher died",
}
PAUSE = "pause rank"  # SIGSTOP, then SIGCONT: the run must continue
CLOCK = "clock step"  # the wall clock jumps by hours or years: the run must continue
FULL = "full disk"  # for some seconds: the run continues, or ends and continues at the next start
HARMLESS = {PAUSE, CLOCK}
FREEZE = "freeze rank"  # SIGSTOP for good: the other rank must exit, and torchrun must end the stopped one


@dataclass(frozen=True)
class Strike:
    kind: str
    rank: int = 0  # for kinds that hit one rank


@dataclass(frozen=True)
class Fault:
    """One strike, or two in quick succession, at a visit to a place.

    `stays`: the process waits at the place until it is struck; otherwise it goes on and is struck some time later.
    """

    place: str
    strikes: tuple[Strike, ...]
    visit: int = 1
    holder: int = 0
    stays: bool = True
    delay_seconds: float = 0.0
    pause_seconds: float = 0.0  # between two strikes

    def __str__(self) -> str:
        location = f"{self.place} {self.visit} of rank {self.holder}" + (
            "" if self.stays else f" +{self.delay_seconds:.2f} s"
        )
        one_rank = (*KILLS[:1], "SIGTERM rank", "SIGUSR1 rank", PAUSE, FREEZE)
        kinds = [f"{strike.kind} {strike.rank}" if strike.kind in one_rank else strike.kind for strike in self.strikes]
        return f"{f' +{self.pause_seconds:.2f} s '.join(kinds)} at {location}"


@dataclass(frozen=True)
class Episode:
    """One start of torchrun with one fault, or with in-place restarts one for each of its attempts.

    `at_rest`: what is damaged before the start (helpers/at_rest.py), and the seed that draws how.
    """

    faults: tuple[Fault, ...]
    at_rest: tuple[tuple[str, int], ...] = ()
    in_place: bool = False
    flags: tuple[str, ...] = ()
    launcher_flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "; then ".join(map(str, self.faults))
        extra = " ".join((*self.launcher_flags, *self.flags))
        text = ", ".join(filter(None, (text, *(f"{kind} ({seed})" for kind, seed in self.at_rest))))
        return text + (" (in-place restarts)" if self.in_place else "") + (f" ({extra})" if extra else "")


@dataclass
class Struck:
    """What was done in an episode, as far as the checks depend on it."""

    strikes: list[Strike] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)  # the faults that were reached
    all_heard: bool = True
    rows: int = 0  # the step of the last row in metrics.jsonl at the strike


def killed_rank_0(strike: Strike) -> bool:
    return strike.kind in ("kill ranks", "kill everything") or (
        strike.kind in ("kill rank", FREEZE) and strike.rank == 0
    )


def at(struck: Struck, *places: str) -> bool:
    return any(fault.place in places for fault in struck.faults)


def stood_beside_the_loop(episode: Episode, struck: Struck) -> bool:
    """Return whether only the saving thread waited, so that the loop went on and noticed a stop some steps later."""
    places = (*BESIDE_THE_LOOP, *(BESIDE_THE_LOOP_IF_ASYNC if episode.flags[:2] == ASYNC_SAVES else ()))
    return at(struck, *places)


def draw(
    rng: random.Random, world: int, *, may_shard: bool, has_begun: bool = False, kinds: Sequence[str] = ()
) -> Episode:
    """Return a random episode; `kinds`: faults beside kills, stops and pauses that this machine can inflict.

    One in two saves asynchronously, one in two shards the model, one in sixteen restarts in place, and one in thirty
    freezes a rank. Of a run that `has_begun`, nine in ten others find one to eight things damaged at the start; one in
    ten of these is not struck as well.
    """
    flags = (*(ASYNC_SAVES if rng.random() < 0.5 else ()), *(SHARDED if may_shard and rng.random() < 0.5 else ()))
    at_rest: tuple[tuple[str, int], ...] = ()
    if has_begun and rng.random() < 0.9:
        kinds_at_rest = ["damaged file"] * rng.randint(1, 6)
        kinds_at_rest += ["damaged checkpoint"] * (rng.random() < 0.4) + ["wrong data"] * (rng.random() < 0.06)
        at_rest = tuple((kind, rng.randrange(10**6)) for kind in kinds_at_rest)
    if rng.random() < 0.06:
        faults = tuple(draw_fault(rng, KILLS[:2], world) for _ in range(rng.randint(1, 3)))
        return Episode(faults, in_place=True, flags=flags)
    if rng.random() < 0.03:
        fault = draw_fault(rng, (FREEZE,), world, places=("step", "update", "validation", "save"))
        limits = ("--parallel.timeout-seconds", "10", "--parallel.init-timeout-seconds", "30")
        return Episode((fault,), flags=(*flags, *limits), launcher_flags=("--shutdown-timeout=5",))
    if at_rest and rng.random() < 0.1:
        return Episode((), at_rest, flags=flags)
    kind = (rng.choice(kinds),) if kinds and rng.random() < 0.25 else (*KILLS, *STOPS, PAUSE)
    return Episode((draw_fault(rng, kind, world),), at_rest, flags=flags)


def draw_fault(rng: random.Random, kinds: tuple[str, ...], world: int, places: tuple[str, ...] | None = None) -> Fault:
    """Return a random fault: one in four at some moment, the others in a place; one in four stops is struck again."""
    stays, delay_seconds = places is not None or rng.random() < 0.75, 0.0
    if not stays:
        place, delay_seconds = rng.choice([("start", rng.uniform(0, 8)), ("step", rng.uniform(0, 0.5))])
    elif places is not None:
        place = rng.choice(places)
    elif rng.random() < 0.2:
        place = rng.choice(RESTART_PLACES)
    else:
        place = rng.choice([name for name in PLACES if name not in RESTART_PLACES])
    most_visits, holders = PLACES[place]
    strikes = [Strike(rng.choice(kinds), rng.randrange(world))]
    if strikes[0].kind in HARMLESS or (strikes[0].kind in STOPS and rng.random() < 0.25):
        strikes.append(Strike(rng.choice((*KILLS, *STOPS)), rng.randrange(world)))
    return Fault(
        place,
        tuple(strikes),
        visit=rng.randint(1, most_visits),
        holder=rng.randrange(world) if holders == "any" else 0,
        stays=stays,
        delay_seconds=delay_seconds,
        pause_seconds=rng.uniform(0, 0.5),
    )
