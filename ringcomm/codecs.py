"""Codecs: how the values of a collective are written on the wire.

A codec is named by a short string. ``"int4"`` sends 4-bit values to the owner of each element
(*up*, the reduce-scatter) and 8-bit sums back (*down*, the all-gather); ``"int4/4"`` uses four bits
both ways. Options stand in brackets: ``"int4[rounding=stochastic,seed=7,ef=0]"``.

========== ============== ============== =================================================
spec       bits up        bits down      error feedback by default
========== ============== ============== =================================================
``none``   32 (exact)     32             no
``bf16``   16             16             no
``fp16``   16             16             no
``int8``   8.5            8.5            no
``int4``   4.5            8.5            yes
``int4/4`` 4.5            4.5            yes, also at the owner (see ``down_codec``)
========== ============== ============== =================================================

Wire format: blocks of 32 values with one bfloat16 scale, see ``csrc/wire/codec_format.h``.
Nothing here needs torch.
"""

import contextlib
import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ringcomm import _core
from ringcomm.arrays import ArrayView, contiguous_copy, empty_like, view
from ringcomm.errors import UsageError, WireError

__all__ = ["BLOCK_ELEMS", "Codec", "codec"]

BLOCK_ELEMS = 32
"""Values per block. Arrays that are cut at multiples of it encode to the same bytes as uncut."""

_NAMES: dict[int, str] = {code: name for name, code in _core.CODECS.items()}
_NONE: int = _core.CODECS["none"]
_BY_WIDTH = {"4": "int4", "8": "int8", "16": "bf16"}
_DOWN_OF = {"int4": "int8"}  # other codecs go down as they went up
_OPTIONS = ("rounding", "seed", "ef")
_ROUNDINGS = ("nearest", "stochastic")
_STOCHASTIC = ("int8", "int4")
_FLAGS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
_SPEC = re.compile(r"([^/\[\]]*)(?:/([^/\[\]]*))?(?:\[([^\[\]]*)\])?")
_INPUTS = ("float32", "bfloat16", "float16")
_FLOAT32: int = _core.DTYPES["float32"]
_SUM: int = _core.REDUCE_OPS["sum"]
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec with its options. Immutable, hashable, comparable, picklable; keeps no state.

    Make one with :func:`codec`.

    Attributes:
        up: Wire id of the first shot (every rank's values to the owner of the element).
        down: Wire id of the second shot (the owner's sums to every rank).
        error_feedback: Whether the users of this codec (the DDP hook) should keep residuals.
            ``encode`` itself goes by its ``residual`` argument alone.
        rounding: ``"nearest"`` (to even) or ``"stochastic"`` (unbiased; draws depend only on seed,
            step, rank and element).
        seed: Of stochastic rounding, in [0, 2**64).
    """

    up: int
    down: int
    error_feedback: bool = False
    rounding: str = "nearest"
    seed: int = 0

    @property
    def spec(self) -> str:
        """The canonical string: ``codec(c.spec) == c``."""
        up = _NAMES[self.up]
        down = _NAMES[self.down]
        name = up
        if down != _DOWN_OF.get(up, up):
            width = {codec: width for width, codec in _BY_WIDTH.items()}.get(down, down)
            name += f"/{width}"
        options = []
        if self.rounding != "nearest":
            options.append(f"rounding={self.rounding}")
        if self.seed:
            options.append(f"seed={self.seed}")
        if self.error_feedback != _default_error_feedback(self.up):
            options.append(f"ef={int(self.error_feedback)}")
        return f"{name}[{','.join(options)}]" if options else name

    def __str__(self) -> str:
        return self.spec

    @property
    def exact(self) -> bool:
        """Whether this is ``none``: values travel as they are."""
        return self.up == _NONE

    @property
    def bits_per_value(self) -> float:
        """Mean bits per value of the two shots, scales included, for whole blocks."""
        bits = _core.bits_per_value(self.up) + _core.bits_per_value(self.down)
        return float(bits) / 2

    @property
    def down_codec(self) -> "Codec":
        """The codec of the second shot, with the same rounding and error feedback if below 8 bits.

        Where its ``error_feedback`` is true, the owner of an element keeps a residual of its own.
        """
        feedback = self.error_feedback and _default_error_feedback(self.down)
        return replace(self, up=self.down, error_feedback=feedback)

    def with_options(
        self,
        *,
        error_feedback: bool | None = None,
        rounding: str | None = None,
        seed: int | None = None,
    ) -> "Codec":
        """This codec with some options changed; None leaves an option as it is."""
        return _checked(
            self.up,
            self.down,
            self.error_feedback if error_feedback is None else error_feedback,
            self.rounding if rounding is None else rounding,
            self.seed if seed is None else seed,
        )

    def wire_bytes(self, num_elems: int, *, down: bool = False) -> int:
        """Bytes that ``num_elems`` encoded values take (of the second shot if ``down``)."""
        if num_elems < 0:
            raise UsageError(f"num_elems is {num_elems}, expected 0 or more")
        return int(_core.wire_bytes(self.down if down else self.up, num_elems))

    # Arrays on the CPU are worked on by the calling thread, without the GIL. Or all arrays of a call are on one GPU:
    # then the work is queued on the current stream of the first one's library, and the call returns at once.

    def encode(
        self,
        x: Any,
        residual: Any = None,
        *,
        step: int = 0,
        rank: int = 0,
        first_elem: int = 0,
        out: Any = None,
    ) -> Any:
        """Encode an array with the first shot's codec.

        Args:
            x: float32, bfloat16 or float16 array of any shape, on the CPU or a GPU. Not modified. A
                non-contiguous one is copied first.
            residual: Error feedback: contiguous writable float32 array with as many elements as
                ``x``. ``x + residual`` is encoded, then ``residual`` holds what the encoding lost.
                Blocks with NaN or Inf decode to NaN and leave their residual as it was.
            step: Counter of stochastic rounding, with ``rank`` and ``first_elem``; no effect on
                rounding to nearest.
            rank: See ``step``.
            first_elem: Index of ``x[0]`` in the whole array, a multiple of 32.
            out: Contiguous writable uint8 array of at least ``wire_bytes(x.size)`` bytes to write to,
                instead of a fresh one. On a GPU only torch and CuPy arrays can do without.

        Returns:
            ``out``, or a fresh 1-D array of ``wire_bytes(x.size)`` bytes: torch.uint8 for a torch
            tensor, CuPy for CuPy, else NumPy uint8.

        Raises:
            UsageError: a wrong dtype, device or size, or a read-only residual or ``out``.
            DeviceError: the GPU refused.
        """
        described = _input(x)
        kept = None
        if residual is not None:
            if self.exact:
                raise UsageError("codec 'none' is exact and takes no residual")
            kept = _float32_in_place(residual, described.num_elems, "residual")
        if first_elem % BLOCK_ELEMS or first_elem < 0:
            raise UsageError(f"first_elem is {first_elem}, expected a multiple of {BLOCK_ELEMS}")
        if not 0 <= step <= _MAX_SEED or not 0 <= rank < 2**32:
            raise UsageError(f"step is {step} and rank {rank}, expected 64 and 32 bits, unsigned")
        if out is None:
            out = empty_like(x, (self.wire_bytes(described.num_elems),), "uint8")
        wire = self._wire(out, described.num_elems, "out")
        queue = _queue(x=described, residual=kept, out=wire)
        if self.exact:
            _exact_bytes(described, wire, queue)
        else:
            _core.encode(
                self.up,
                described.ptr,
                described.dtype,
                described.num_elems,
                wire.ptr,
                0 if kept is None else kept.ptr,
                self.rounding == "stochastic",
                self.seed,
                step,
                rank,
                first_elem,
                queue,
            )
        return out

    def decode(self, buf: Any, num_elems: int, dtype: Any = None, out: Any = None) -> Any:
        """Decode ``num_elems`` values that :meth:`encode` wrote.

        Args:
            buf: Contiguous uint8 array of at least ``wire_bytes(num_elems)`` bytes; more are
                ignored.
            num_elems: How many values to decode.
            dtype: Of the result: float32 (the default), bfloat16 or float16, as a string, NumPy
                dtype or torch dtype. Values are rounded to it to nearest even.
            out: Contiguous writable array of ``num_elems`` elements to decode into, instead of a
                fresh one; its dtype decides.

        Returns:
            ``out``, or a fresh 1-D array of the library of ``buf``, as in :meth:`encode`.

        Raises:
            WireError: ``buf`` is too short.
            UsageError: a wrong dtype or size, or a read-only ``out``.
        """
        wire = self._wire(buf, num_elems, "buf")
        if out is None:
            out = empty_like(buf, (num_elems,), _dtype_name(dtype))
        elif dtype is not None:
            raise UsageError("pass dtype or out, not both: out decides its dtype")
        target = view(out, writable=True, role="out")
        if target.dtype_name not in _INPUTS or not target.contiguous:
            raise UsageError(
                f"out: a {_layout(target)} {target.dtype_name} array, expected a contiguous one of "
                f"{', '.join(_INPUTS)}"
            )
        if target.num_elems != num_elems:
            raise UsageError(f"out has {target.num_elems} elements, num_elems is {num_elems}")
        queue = _queue(buf=wire, out=target)
        if self.exact:
            _copy_exact(wire, target, queue)
        else:
            _core.decode(self.up, wire.ptr, num_elems, target.ptr, target.dtype, queue)
        return out

    def decode_add(self, buf: Any, acc: Any) -> Any:
        """Add decoded values to ``acc``, in place.

        Args:
            buf: Contiguous uint8 array of at least ``wire_bytes(acc.size)`` bytes.
            acc: Contiguous writable float32 array of any shape.

        Returns:
            ``acc``.

        Raises:
            WireError: ``buf`` is too short.
            UsageError: a wrong dtype or layout, or a read-only ``acc``.
        """
        target = _float32_in_place(acc, None, "acc")
        wire = self._wire(buf, target.num_elems, "buf")
        queue = _queue(buf=wire, acc=target)
        if self.exact:
            _add_exact(wire, target, queue)
        else:
            _core.decode_add(self.up, wire.ptr, target.num_elems, target.ptr, False, queue)
        return acc

    def _wire(self, buf: Any, num_elems: int, role: str) -> ArrayView:
        wire = view(buf, writable=role == "out", role=role)
        if wire.dtype_name != "uint8" or not wire.contiguous:
            raise UsageError(
                f"{role}: a {_layout(wire)} {wire.dtype_name} array, expected contiguous uint8 bytes"
            )
        expected = self.wire_bytes(num_elems)
        if wire.num_bytes < expected:
            kind = UsageError if role == "out" else WireError
            raise kind(
                f"{role} has {wire.num_bytes} bytes, but {num_elems} values encoded as "
                f"{_NAMES[self.up]} take {expected}"
            )
        return wire


def codec(spec: str | Codec) -> Codec:
    """Parse a codec string.

    Args:
        spec: ``"<up>"`` or ``"<up>/<down>"`` with options in brackets. ``<up>`` is one of none,
            bf16, fp16, int8, int4; ``<down>`` one of these or a width (4, 8, 16); it defaults to
            ``<up>``, and to int8 for int4. Options: ``rounding=nearest|stochastic``, ``seed=<int>``
            (stochastic rounding only), ``ef=0|1`` (keep residuals; on by default below 8 bits).
            A :class:`Codec` is returned as it is.

    Returns:
        The codec. Its ``spec`` is the canonical form of the string.

    Raises:
        UsageError: an unknown name or option; the message shows the closest one and the full list.
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise UsageError(
            f"codec is a {type(spec).__name__}, expected a string such as 'int8' or a Codec; "
            f"known are {', '.join(_core.CODECS)}"
        )
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise UsageError(
            f"codec {spec!r} does not parse, expected 'name', 'up/down' or 'name[option=value,...]'"
            ", such as 'int4/4[ef=0]'"
        )
    up_name = match[1].strip().lower()
    up = _lookup(spec, up_name, list(_core.CODECS))
    if match[2] is None:
        down_name = _DOWN_OF.get(up_name, up_name)
    else:
        down_name = match[2].strip().lower()
        down_name = _BY_WIDTH.get(down_name, down_name)
    down = _lookup(spec, down_name, [*_core.CODECS, *_BY_WIDTH])
    options = _parse_options(spec, match[3])
    feedback = _default_error_feedback(up)
    if "ef" in options:
        flag = options["ef"].lower()
        if flag not in _FLAGS:
            raise UsageError(f"codec {spec!r}: ef={options['ef']}, expected 0 or 1")
        feedback = _FLAGS[flag]
    rounding = options.get("rounding", "nearest").lower()
    try:
        seed = int(options.get("seed", "0"), 0)
    except ValueError:
        raise UsageError(f"codec {spec!r}: seed={options['seed']}, expected an integer") from None
    return _checked(up, down, feedback, rounding, seed, spec)


def _checked(
    up: int, down: int, feedback: bool, rounding: str, seed: int, spec: str | None = None
) -> Codec:
    where = f"codec {spec or _NAMES[up]!r}"
    if rounding not in _ROUNDINGS:
        raise UsageError(
            f"{where}: rounding={rounding}{_closest(rounding, _ROUNDINGS)}; known are "
            f"{', '.join(_ROUNDINGS)}"
        )
    if (up == _NONE) != (down == _NONE):
        raise UsageError(
            f"{where}: 'none' cannot be mixed with another codec; for a 16-bit way use 'bf16'"
        )
    if up == _NONE and (feedback or rounding != "nearest"):
        raise UsageError(f"{where}: 'none' is exact and takes no options")
    whole = [_NAMES[way] for way in (up, down) if _NAMES[way] not in _STOCHASTIC]
    if rounding == "stochastic" and whole:
        raise UsageError(
            f"{where}: {whole[0]} rounds to nearest only; rounding=stochastic takes "
            f"{' and '.join(_STOCHASTIC)}, both up and down"
        )
    if seed and rounding != "stochastic":
        raise UsageError(f"{where}: seed has no effect without rounding=stochastic")
    if not 0 <= seed <= _MAX_SEED:
        raise UsageError(f"{where}: seed={seed}, expected a value in [0, 2**64)")
    return Codec(up, down, bool(feedback), rounding, seed)


def _parse_options(spec: str, text: str | None) -> dict[str, str]:
    options: dict[str, str] = {}
    if text is None:
        return options
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.lower()
        if name not in _OPTIONS:
            raise UsageError(
                f"codec {spec!r}: unknown option {name!r}{_closest(name, _OPTIONS)}; known are "
                "rounding=nearest|stochastic, seed=<int>, ef=0|1"
            )
        if not equals or not value:
            raise UsageError(f"codec {spec!r}: option {name!r} needs a value, as {name}=...")
        if name in options:
            raise UsageError(f"codec {spec!r}: option {name!r} is given twice")
        options[name] = value
    return options


def _lookup(spec: str, name: str, candidates: list[str]) -> int:
    if name in _core.CODECS:
        return int(_core.CODECS[name])
    raise UsageError(
        f"unknown codec {spec!r}: there is no {name!r}{_closest(name, candidates)}; known are "
        f"{', '.join(_core.CODECS)}, with another way down as in 'int4/4' and options as in "
        "'int4[ef=0]'"
    )


def _closest(name: str, candidates: "list[str] | tuple[str, ...]") -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _default_error_feedback(codec_id: int) -> bool:
    return bool(_core.bits_per_value(codec_id) < 8)


# ---- arrays --------------------------------------------------------------------------------------


def _input(x: Any) -> ArrayView:
    described = view(x, writable=False)
    if described.dtype_name not in _INPUTS:
        raise UsageError(
            f"x: codecs take {', '.join(_INPUTS)}, found {described.dtype_name}; send other dtypes "
            "without a codec"
        )
    return described if described.contiguous else view(contiguous_copy(x), writable=False)


def _float32_in_place(x: Any, num_elems: int | None, role: str) -> ArrayView:
    described = view(x, writable=True, role=role)
    if described.dtype != _FLOAT32 or not described.contiguous:
        raise UsageError(
            f"{role}: a {_layout(described)} {described.dtype_name} array, expected a contiguous "
            "float32 one (it is updated in place)"
        )
    if num_elems is not None and described.num_elems != num_elems:
        raise UsageError(f"{role} has {described.num_elems} elements, x has {num_elems}")
    return described


def _layout(described: ArrayView) -> str:
    return "contiguous" if described.contiguous else "non-contiguous"


def _queue(**arrays: ArrayView | None) -> int | None:
    """Where the core works on the arrays: None on the CPU, else the current stream of the first one's library."""
    (first_role, first), *others = ((role, array) for role, array in arrays.items() if array)
    for role, array in others:
        if array.device != first.device:
            raise UsageError(
                f"{first_role} is on {first.device}, {role} on {array.device}; all must be on one device"
            )
    return None if first.device == "cpu" else first.stream


def _dtype_name(dtype: Any) -> str:
    if dtype is None:
        return "float32"
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in _INPUTS:
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    if name not in _INPUTS:
        raise UsageError(f"dtype is {dtype!r}, expected one of {', '.join(_INPUTS)}")
    return name


# `none` moves float32 bytes. It is here so that every codec has the same interface; collectives
# never come this way.


class _Bytes:
    def __init__(self, described: ArrayView) -> None:
        self.owner = described.owner
        self.__array_interface__ = {
            "version": 3,
            "shape": (described.num_bytes,),
            "typestr": "|u1",
            "data": (described.ptr, not described.writable),
        }


def _bytes_of(described: ArrayView) -> "np.ndarray[Any, Any]":
    return np.asarray(_Bytes(described))


def _widen(described: ArrayView) -> "np.ndarray[Any, Any]":
    raw = _bytes_of(described)
    if described.dtype_name == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(described.dtype_name).astype(np.float32)


def _exact_bytes(described: ArrayView, wire: ArrayView, queue: int | None) -> None:
    count = described.num_elems
    if queue is not None:
        _core.reduce_hop(described.dtype, _SUM, 0, described.ptr, wire.ptr, count, queue)
    else:
        _bytes_of(wire)[: 4 * count] = _widen(described).view(np.uint8)


def _copy_exact(wire: ArrayView, target: ArrayView, queue: int | None) -> None:
    if queue is not None:
        _core.finish_hops(target.dtype, _SUM, wire.ptr, 1, target.ptr, target.num_elems, queue)
        return
    values = _bytes_of(wire)[: target.num_elems * 4].view(np.float32)
    raw = _bytes_of(target)
    if target.dtype_name == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        raw.view(np.uint16)[:] = np.where(np.isnan(values), 0x7FC0, rounded)
    else:
        raw.view(target.dtype_name)[:] = values


def _add_exact(wire: ArrayView, target: ArrayView, queue: int | None) -> None:
    if queue is not None:
        count = target.num_elems
        _core.reduce_hop(_FLOAT32, _SUM, target.ptr, wire.ptr, target.ptr, count, queue)
        return
    total = _bytes_of(target).view(np.float32)
    total += _bytes_of(wire)[: target.num_bytes].view(np.float32)
