"""Every environment variable that ringcomm reads, in one table.

A variable is read when something first asks for it, never at import, and then remembered.
Arguments beat variables. The C++ side reads no environment; it is told.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

from ringcomm.errors import UsageError

__all__ = [
    "TRACE",
    "VARIABLES",
    "RankInfo",
    "Variable",
    "forget",
    "get",
    "logger",
    "rank_info",
    "table",
]

TRACE = 5
"""The logging level below DEBUG that ``RINGCOMM_DEBUG=TRACE`` turns on."""

Kind = Literal["int", "float", "str", "bool"]


@dataclass(frozen=True)
class Variable:
    """One row of the table.

    Attributes:
        name: As the environment spells it.
        kind: The type that :func:`get` returns.
        default: What :func:`get` returns when the variable is unset or empty; None means "not said".
        meaning: One line for people, with the unit.
        choices: The allowed values, if they are few; compared without case.
        at_least: The smallest allowed number.
    """

    name: str
    kind: Kind
    default: int | float | str | bool | None
    meaning: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None

    def allowed(self) -> str:
        """What a value must look like, for messages and tables."""
        if self.choices:
            return " | ".join(self.choices)
        noun = {"int": "a whole number", "float": "a number", "str": "text", "bool": "1 or 0"}[
            self.kind
        ]
        if self.at_least is None:
            return noun
        above = ">" if self.kind == "float" else ">="
        return f"{noun} {above} {self.at_least:g}"

    def parse(self, text: str) -> int | float | str | bool:
        """The typed value of `text`. Raises UsageError that names variable, value and what is allowed."""
        if self.choices:
            for choice in self.choices:
                if text.lower() == choice.lower():
                    return choice
        elif self.kind == "str":
            return text
        elif self.kind == "bool":
            if text.lower() in ("1", "true", "yes", "on"):
                return True
            if text.lower() in ("0", "false", "no", "off"):
                return False
        else:
            try:
                number = int(text) if self.kind == "int" else float(text)
            except ValueError:
                pass
            else:
                low = self.at_least
                if low is None or (
                    number >= low if self.kind == "int" else low < number < float("inf")
                ):
                    return number
        raise UsageError(f"environment variable {self.name}={text!r}: it must be {self.allowed()}")


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        # ringcomm's own
        Variable(
            "RINGCOMM_TIMEOUT",
            "float",
            300.0,
            "seconds that a collective waits for its peers",
            at_least=0,
        ),
        Variable(
            "RINGCOMM_SIMD",
            "str",
            None,
            "forces the CPU kernels' instruction set (default: the best that runs here)",
            choices=("baseline", "avx2", "avx512"),
        ),
        Variable(
            "RINGCOMM_DEBUG",
            "str",
            "WARN",
            "what is logged to standard error",
            choices=("WARN", "INFO", "TRACE"),
        ),
        Variable(
            "RINGCOMM_DEBUG_SUBSYS",
            "str",
            None,
            "which messages below WARN: INIT,COLL,FAULT,TUNE or ^COLL for all others (default: all)",
        ),
        Variable(
            "RINGCOMM_DEBUG_FILE",
            "str",
            None,
            "file for the messages instead; %h is the host's name, %p the process id",
        ),
        Variable(
            "RINGCOMM_TUNING",
            "str",
            None,
            "table of `python -m ringcomm.tune`: a path, or off (default: this machine's, in the user's cache)",
        ),
        Variable(
            "RINGCOMM_FLIGHT_RECORDER",
            "int",
            None,
            "how many calls per communicator the flight recorder keeps (default 256; 0: none)",
            at_least=0,
        ),
        Variable(
            "RINGCOMM_FLIGHT_RECORDER_FILE",
            "str",
            None,
            "start of the file, ended by the rank, in which an error that loses the communicator leaves its last calls",
        ),
        # torch's names of the two above
        Variable("TORCH_FR_BUFFER_SIZE", "int", None, "as RINGCOMM_FLIGHT_RECORDER", at_least=0),
        Variable("TORCH_FR_DUMP_TEMP_FILE", "str", None, "as RINGCOMM_FLIGHT_RECORDER_FILE"),
        Variable(
            "RINGCOMM_STAGING_KIB",
            "int",
            None,
            "KiB of shared staging memory per rank (default: chosen by the transport)",
            at_least=4,
        ),
        Variable(
            "RINGCOMM_CUDA_MODE",
            "str",
            "auto",
            "how collectives of arrays on GPUs run (auto: in_kernel if the GPUs can, else stepped, else host)",
            choices=("auto", "in_kernel", "stepped", "host"),
        ),
        Variable(
            "RINGCOMM_CUDA_SLAB_MIB",
            "int",
            32,
            "MiB of GPU memory per rank that peers write into",
            at_least=1,
        ),
        Variable(
            "RINGCOMM_CUDA_DIRECT_KIB",
            "int",
            1024,
            "arrays on GPUs of at least so many KiB are mapped by the peers and used where they are (-1: none is)",
            at_least=-1,
        ),
        Variable(
            "RINGCOMM_DEVICE",
            "str",
            None,
            "simt: the torch backend takes CPU tensors as arrays of emulated GPUs, for tests",
            choices=("simt",),
        ),
        Variable(
            "RINGCOMM_CACHE_DIR",
            "str",
            None,
            "folder of what is compiled on first use (default: ringcomm in XDG_CACHE_HOME or ~/.cache)",
        ),
        # torchrun and everything that speaks its language
        Variable("RANK", "int", None, "this process's rank in the job", at_least=0),
        Variable("WORLD_SIZE", "int", None, "number of processes in the job", at_least=1),
        Variable("LOCAL_RANK", "int", None, "rank within this machine", at_least=0),
        Variable("LOCAL_WORLD_SIZE", "int", None, "processes on this machine", at_least=1),
        Variable("MASTER_ADDR", "str", None, "host of the rendezvous store"),
        Variable("MASTER_PORT", "int", None, "TCP port of the rendezvous store", at_least=1),
        Variable(
            "TORCHELASTIC_RESTART_COUNT",
            "int",
            0,
            "how often torchrun restarted the job",
            at_least=0,
        ),
        Variable("TORCHELASTIC_RUN_ID", "str", None, "torchrun's name of the job"),
        Variable(
            "TORCHELASTIC_USE_AGENT_STORE",
            "bool",
            False,
            "torchrun's agent already serves the store",
        ),
        # CuPy's, for ringcomm.cupyx
        Variable("CUPYX_DISTRIBUTED_HOST", "str", None, "host of ringcomm.cupyx's rendezvous"),
        Variable(
            "CUPYX_DISTRIBUTED_PORT", "int", None, "port of ringcomm.cupyx's rendezvous", at_least=1
        ),
        # read only when RANK is not set
        Variable("OMPI_COMM_WORLD_RANK", "int", None, "rank, from Open MPI's mpirun", at_least=0),
        Variable("OMPI_COMM_WORLD_SIZE", "int", None, "world size, from mpirun", at_least=1),
        Variable("OMPI_COMM_WORLD_LOCAL_RANK", "int", None, "local rank, from mpirun", at_least=0),
        Variable(
            "OMPI_COMM_WORLD_LOCAL_SIZE", "int", None, "local world size, from mpirun", at_least=1
        ),
        Variable("SLURM_PROCID", "int", None, "rank, from srun", at_least=0),
        Variable("SLURM_NTASKS", "int", None, "world size, from srun", at_least=1),
        Variable("SLURM_LOCALID", "int", None, "local rank, from srun", at_least=0),
    )
}

# Who launched us: the first whose rank variable is set. Pieces of two launchers never mix.
_LAUNCHERS: tuple[tuple[str, str, str, str | None], ...] = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", None),
)

_remembered: dict[str, Any] = {}


@overload
def get(name: Literal["RINGCOMM_TIMEOUT"]) -> float: ...
@overload
def get(name: Literal["TORCHELASTIC_USE_AGENT_STORE"]) -> bool: ...
@overload
def get(name: Literal["TORCHELASTIC_RESTART_COUNT"]) -> int: ...
@overload
def get(name: Literal["RINGCOMM_DEBUG", "RINGCOMM_CUDA_MODE"]) -> str: ...
@overload
def get(name: Literal["RINGCOMM_CUDA_SLAB_MIB", "RINGCOMM_CUDA_DIRECT_KIB"]) -> int: ...
@overload
def get(
    name: Literal[
        "RINGCOMM_SIMD",
        "RINGCOMM_CACHE_DIR",
        "RINGCOMM_DEVICE",
        "RINGCOMM_DEBUG_SUBSYS",
        "RINGCOMM_DEBUG_FILE",
        "RINGCOMM_TUNING",
        "RINGCOMM_FLIGHT_RECORDER_FILE",
        "TORCH_FR_DUMP_TEMP_FILE",
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
        "CUPYX_DISTRIBUTED_HOST",
    ],
) -> str | None: ...
@overload
def get(
    name: Literal[
        "RINGCOMM_STAGING_KIB",
        "RINGCOMM_FLIGHT_RECORDER",
        "TORCH_FR_BUFFER_SIZE",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_PORT",
        "CUPYX_DISTRIBUTED_PORT",
    ],
) -> int | None: ...
@overload
def get(name: str) -> Any: ...
def get(name: str) -> Any:
    """The typed value of a variable of the table, or its default when it is unset or empty.

    Read from the environment once and remembered; :func:`forget` makes the next call read again.

    Raises:
        UsageError: The value is not allowed; the message names variable, value and what is allowed.
        KeyError: The table has no such variable (a bug in ringcomm, not in its use).
    """
    if name not in _remembered:
        variable = VARIABLES[name]
        text = os.environ.get(name, "").strip()
        _remembered[name] = variable.parse(text) if text else variable.default
    return _remembered[name]


def forget() -> None:
    """Drops everything remembered, for tests and for programs that change their environment."""
    _remembered.clear()


class RankInfo(NamedTuple):
    """What the launcher said. A piece that it did not say is None."""

    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None


def rank_info() -> RankInfo:
    """Rank and world size from torchrun's variables, else Open MPI's, else SLURM's.

    Raises:
        UsageError: A value is not allowed, or a rank is not below its size.
    """
    for names in _LAUNCHERS:
        if get(names[0]) is None:
            continue
        info = RankInfo(*(get(name) if name is not None else None for name in names))
        for rank, size, rank_name, size_name in (
            (info.rank, info.world_size, names[0], names[1]),
            (info.local_rank, info.local_world_size, names[2], names[3]),
        ):
            if rank is not None and size is not None and rank >= size:
                raise UsageError(
                    f"environment variable {rank_name}={rank} must be below {size_name}={size}"
                )
        return info
    return RankInfo(None, *(get(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def table() -> list[tuple[str, str, str, str]]:
    """Rows (name, allowed values, default, meaning) for the README and ``python -m ringcomm.info``."""
    return [
        (v.name, v.allowed(), "" if v.default is None else f"{v.default}", v.meaning)
        for v in VARIABLES.values()
    ]


logging.getLogger("ringcomm").addHandler(logging.NullHandler())
_logger_is_set_up = False


def logger(subsystem: str = "") -> logging.Logger:
    """The ``ringcomm`` logger, or its child for messages of one subsystem (``"INIT"``).

    The first call (never the import) obeys ``RINGCOMM_DEBUG``: if it is set, messages go to standard
    error, or to ``RINGCOMM_DEBUG_FILE``, as ``[rank3] ringcomm INFO: ...``. If it is not, the
    application's own logging decides.
    """
    global _logger_is_set_up
    log = logging.getLogger("ringcomm")
    if not _logger_is_set_up:
        _logger_is_set_up = True
        logging.addLevelName(TRACE, "TRACE")
        if os.environ.get("RINGCOMM_DEBUG", "").strip():
            level = {"WARN": logging.WARNING, "INFO": logging.INFO, "TRACE": TRACE}[
                get("RINGCOMM_DEBUG")
            ]
            rank = rank_info().rank
            handler = _log_handler()
            prefix = "" if rank is None else f"[rank{rank}] "
            handler.setFormatter(logging.Formatter(f"{prefix}ringcomm %(levelname)s: %(message)s"))
            handler.addFilter(_subsystem_filter(get("RINGCOMM_DEBUG_SUBSYS")))
            log.addHandler(handler)
            log.setLevel(level)
            log.propagate = False
    return log.getChild(subsystem) if subsystem else log


def _log_handler() -> logging.Handler:
    path = get("RINGCOMM_DEBUG_FILE")
    if path is None:
        return logging.StreamHandler()
    path = path.replace("%h", socket.gethostname()).replace("%p", str(os.getpid()))
    try:
        return logging.FileHandler(path)
    except OSError as error:
        raise UsageError(
            f"environment variable RINGCOMM_DEBUG_FILE: cannot write {path}: {error}"
        ) from error


def _subsystem_filter(selection: str | None) -> Callable[[logging.LogRecord], bool]:
    """What ``RINGCOMM_DEBUG_SUBSYS`` lets through: "INIT,COLL" these, "^COLL" all but this."""
    names = [name.strip().upper() for name in (selection or "").split(",") if name.strip()]
    excluded = {name[1:] for name in names if name.startswith("^")}
    included = {name for name in names if not name.startswith("^")} - {"ALL"}

    def passes(record: logging.LogRecord) -> bool:
        subsystem = record.name.partition(".")[2]
        if record.levelno >= logging.WARNING or not subsystem:
            return True
        return subsystem not in excluded and (not included or subsystem in included)

    return passes
