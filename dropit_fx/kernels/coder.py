"""The value coder in plain PyTorch: codes of 1..8 bits, and a few bfloat16 numbers per block.

Three spacings of levels, each one formula of the code (`level_table`):

* symmetric, 1..3 bits: sign and index into 1, 2 or 4 magnitudes stored per block. The cells are
  equal steps of |x|^(1/2) (|x|^(1/4) for 3 bits) between the least and the greatest kept magnitude,
  and each cell is read back as sum(x^2) / sum(|x|) of what fell into it: the level for which <x,
  decoded x> = <x, x>, so that dW is not shrunk (the mean of the cell, which has the least squared
  error, shrinks it).
* symmetric, 4..8 bits: sign and magnitude (a + j*w)^2, equal steps of sqrt|x| from the least kept
  magnitude to the greatest. The end points are levels, so outliers are neither clipped nor shrunk.
* affine: b + (j*w)^2, equal steps of sqrt(x - min). For one-sided tensors (after GELU or softmax):
  fine steps where the mass is, the tail kept.
* uniform: b + j*w, equal steps of x from the least value to the greatest. For two-sided tensors
  without a heavy tail.

A square root is the cheap companding between uniform steps (best for the peak) and logarithmic ones
(best for the tail of real activations). With stochastic rounding the levels span [min, max] and a
value goes up with probability (x - lower) / (upper - lower): its decoded mean is x (1 bit: +max or
-max with mean x).

Bit-exactness. Other implementations must produce the same bits, so nothing depends on an order of
summation: the sums are of integers, every float operation is one correctly rounded IEEE operation,
nothing is fused.

What is not finite is read back as it is, and what is finite beside it is coded as if it were
alone. A block that holds NaN or Inf is marked: by the sign of the scale's last number, or where the
uniform spacing has signs in its two numbers, by their order. In their place stand codes that no
finite value has then. Of a block with NaN it is the last one, all ones, and infinities read as NaN
too; such a block's last number is odd. Of a block with infinities alone they are the last code of
either sign, or where codes have no sign, the last for +Inf and the one before for -Inf; its last
number is even. Finite values whose codes these were have the nearest other; a codebook that does
not draw has one level for two neighbouring cells. One bit has no code to spare: the scale is what
the block holds that is not finite, NaN where that is of several kinds; code 1 reads as it, 0 as 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dropit_fx.kernels.format import AFFINE, UNIFORM, Format

_TOP = 0x7F7F0000  # the greatest finite bfloat16, as a float32 pattern


def encode(values: Tensor, form: Format, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantises rows of kept values, one row a block.

    Args:
        values: (rows, k) floating.
        form: of 1..8 bits.
        draws: (rows, k) uniform 32-bit integers for stochastic rounding; None: nearest.

    Returns:
        Codes (rows, k) uint8, and scale (rows, columns) bfloat16.
    """
    (rows, k), bits = values.shape, form.bits
    if k == 0 or rows == 0:
        scale = values.new_zeros(rows, form.columns, dtype=torch.bfloat16)
        return values.new_empty(rows, k, dtype=torch.uint8), scale
    x = values.to(torch.float32)
    given, finite = x, x.isfinite()
    marked, has_nan = ~finite.all(1, keepdim=True), x.isnan().any(1, keepdim=True)
    least = torch.where(finite, x, torch.inf).amin(1, keepdim=True)
    x = torch.where(finite, x, torch.where(least.isfinite(), least, 0.0))
    unread = torch.zeros_like(marked)

    def told(last: Tensor) -> Tensor:
        return torch.where(marked, with_parity(last, has_nan), last)

    chance = None if draws is None else (draws >> 8).to(torch.float32) * 2.0**-24
    if form.spacing in (AFFINE, UNIFORM):
        encode_above = _encode_affine if form.spacing == AFFINE else _encode_uniform
        codes, scale, unread = encode_above(x, bits, chance, told)
    else:
        magnitude = x.abs()
        low, high = magnitude.amin(1, keepdim=True), magnitude.amax(1, keepdim=True)
        if chance is not None and bits == 1:
            scale = upper_bfloat16(high)
            negative = (chance * (scale + scale)) >= x + scale
            codes = negative.to(torch.int64)
        else:
            if not form.is_codebook:
                step, scale = _encode_grid(magnitude, low, high, bits, chance, told)
            elif chance is None:
                step, scale = _encode_codebook(magnitude, finite, low, high, bits)
            else:
                step, scale = _encode_codebook_stochastic(magnitude, low, high, bits, chance)
            codes = step | (x.signbit().to(torch.int64) << (bits - 1))
    if bits == 1:
        least = torch.where(finite, torch.inf, given).amin(1, keepdim=True)
        most = torch.where(finite, -torch.inf, given).amax(1, keepdim=True)
        kind = torch.where(least == most, most, torch.nan)
        codes = torch.where(marked, (~finite).to(codes.dtype), torch.where(unread, 0, codes))
        scale = torch.where(marked, kind, torch.where(unread, torch.nan, scale))
        return codes.to(torch.uint8), scale.to(torch.bfloat16)
    if form.is_codebook:
        scale = torch.cat([scale[:, :-1], told(scale[:, -1:])], 1)
    infinite = marked & is_even(scale[:, -1:])
    theirs, others = codes_of(given < 0, infinite, form)
    codes = torch.where(finite, torch.where(marked, others(codes), codes), theirs)
    codes = torch.where(unread, 0, codes)
    scale = torch.where(marked, _mark(scale, form), scale)
    scale = torch.where(unread, torch.nan, scale)
    return codes.to(torch.uint8), scale.to(torch.bfloat16)


def codes_of(
    negative: Tensor, infinite: Tensor, form: Format
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The codes of what is not finite, and what becomes of those of finite values beside it."""
    last = 2**form.bits - 1
    if form.spacing in (AFFINE, UNIFORM):
        theirs = torch.where(infinite & negative, last - 1, last)
        return theirs, lambda codes: torch.minimum(codes, last - 1 - infinite.to(codes.dtype))
    top = last >> 1  # the last step, of either sign
    theirs = torch.where(infinite & ~negative, top, last)

    def others(codes: Tensor) -> Tensor:
        taken: Tensor = (codes == last) | (infinite & (codes == top))
        return codes - taken.to(codes.dtype)

    return theirs, others


def is_even(last: Tensor) -> Tensor:
    """Whether bfloat16 numbers, in float32, are even: of marked blocks, which hold no NaN."""
    even: Tensor = last.view(torch.int32) & 0x10000 == 0
    return even


def with_parity(last: Tensor, odd: Tensor) -> Tensor:
    """The bfloat16 number, in float32, or where that is not as odd as asked the next one above.

    The greatest of all is odd.
    """
    bits = last.view(torch.int32)
    wrong = ((bits & 0x10000 != 0) != odd) & (bits != _TOP)
    up = torch.where(bits < 0, -0x10000, 0x10000)
    return (bits + (up * wrong).to(torch.int32)).view(torch.float32)


def decode(codes: Tensor, scale: Tensor, form: Format, dtype: torch.dtype) -> Tensor:
    """Inverse of `encode`: (rows, k) uint8, (rows, columns) bfloat16 -> (rows, k) of `dtype`.

    A level beyond the greatest finite number of `dtype` becomes that number.
    """
    top = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return level_table(scale, form, top).gather(1, codes.to(torch.int64)).to(dtype)


def level_table(scale: Tensor, form: Format, top: float) -> Tensor:
    """The value of each code: (rows, columns) bfloat16 -> (rows, 2**bits) float32.

    What is not finite has the codes of a row that is marked, and of one whose levels are all the
    same: there, they are no value's.

    Args:
        scale: Of each row.
        form: Of 1..8 bits.
        top: What finite levels are at most.
    """
    scale = scale.to(torch.float32)
    if form.bits == 1:
        kind = scale[:, :1]
        read = torch.where(kind.isfinite(), scale, 0.0)
        levels = _levels(read, form).clamp(-top, top)
        return torch.where(kind.isfinite(), levels, torch.cat([torch.zeros_like(kind), kind], 1))
    marked = _is_marked(scale, form)
    scale = torch.where(marked, _mark(scale, form), scale)
    levels = _levels(scale, form).clamp(-top, top)
    infinite = marked & is_even(scale[:, -1:])
    last = 2**form.bits - 1
    signed = form.spacing not in (AFFINE, UNIFORM)
    other = last >> 1 if signed else last - 1
    beyond = torch.where(infinite, -torch.inf if signed else torch.inf, torch.nan)
    levels[:, last:] = torch.where(marked, beyond, levels[:, last:])
    here = slice(other, other + 1)
    levels[:, here] = torch.where(infinite, torch.inf if signed else -torch.inf, levels[:, here])
    return levels


def may_hold_nan(scale: Tensor, form: Format) -> Tensor:
    """(rows,): which rows, by their scale (rows, columns), may hold what is not finite."""
    return _is_marked(scale, form)[:, 0] | ~scale.isfinite().all(1)


def _is_marked(scale: Tensor, form: Format) -> Tensor:
    return scale[:, :1] >= scale[:, 1:] if form.spacing == UNIFORM else scale[:, -1:].signbit()


def _mark(scale: Tensor, form: Format) -> Tensor:
    """Marks rows, or takes the mark away."""
    if form.spacing == UNIFORM:
        return scale.flip(1)
    return torch.cat([scale[:, :-1], -scale[:, -1:]], 1)


def _levels(scale: Tensor, form: Format) -> Tensor:
    if form.spacing in (AFFINE, UNIFORM):
        base, top = scale[:, :1], scale[:, 1:]
        count = 2**form.bits
        if form.spacing == UNIFORM:  # rounding must not lift the last level above the end
            return torch.minimum(base + _steps(count, scale) * _divide(top - base, count - 1), top)
        root = _steps(count, scale) * _divide(top, count - 1)
        return base + root * root
    count = 2 ** (form.bits - 1)
    if form.is_codebook:
        magnitude = scale
    else:
        magnitude = _grid(scale[:, :1], scale[:, 1:], _steps(count, scale), count)
    return torch.cat([magnitude, -magnitude], 1)


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.float32)


def _grid(start: Tensor, end: Tensor, step: Tensor, count: int) -> Tensor:
    """(start + step * w)^2, where `count` steps lead from start to end."""
    root = start + step * _divide(end - start, count - 1)
    return root * root


def inverse(count: int, span: Tensor) -> Tensor:
    """Count / span, and 0 for an empty span."""
    return torch.where(span > 0, torch.full_like(span, count) / span, 0.0)


def exact_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root, which torch's own on CPU (MKL's) is not."""
    return x.double().sqrt().float()


def _divide(x: Tensor, count: int) -> Tensor:
    """One IEEE division: torch may turn `x / number` and `number / x` into multiplications."""
    return x / torch.full_like(x, count)


def _encode_affine(
    x: Tensor, bits: int, chance: Tensor | None, told: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    count = 2**bits
    base = floor_bfloat16(x.amin(1, keepdim=True))
    above = (x - base).clamp(min=0)
    widest = above.amax(1, keepdim=True)
    overflow = widest.isinf()
    above = torch.where(overflow, 0.0, above)
    top = told(upper_bfloat16(exact_sqrt(torch.where(overflow, 0.0, widest))))
    position = exact_sqrt(above) * inverse(count - 1, top)

    def level(step: Tensor) -> Tensor:
        root = step.to(torch.float32) * _divide(top, count - 1)
        return root * root

    step = _round_step(position, above, count, level, chance)
    return step, torch.cat([base, top], 1), overflow


def _encode_uniform(
    x: Tensor, bits: int, chance: Tensor | None, told: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    count = 2**bits
    most = x.amax(1, keepdim=True)
    base, top = floor_bfloat16(x.amin(1, keepdim=True)), told(ceil_bfloat16(most))
    overflow = (torch.maximum(most, top) - base).isinf()
    span = torch.where(overflow, 0.0, top - base)
    above = torch.where(overflow, 0.0, (x - base).clamp(min=0))
    # The inverse of a span near the subnormal numbers would overflow
    zoom = torch.where(span < 2.0**-64, 2.0**64, 1.0)
    position = above * zoom * inverse(count - 1, span * zoom)

    def level(step: Tensor) -> Tensor:
        return torch.minimum(step.to(torch.float32) * _divide(span, count - 1), span)

    step = _round_step(position, above, count, level, chance)
    return step, torch.cat([base, top], 1), overflow


def _encode_grid(
    magnitude: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    chance: Tensor | None,
    told: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    count = 2 ** (bits - 1)
    start, end = lower_bfloat16(exact_sqrt(low)), told(upper_bfloat16(exact_sqrt(high)))
    position = (exact_sqrt(magnitude) - start) * inverse(count - 1, end - start)

    def level(step: Tensor) -> Tensor:
        return _grid(start, end, step.to(torch.float32), count)

    step = _round_step(position, magnitude, count, level, chance)
    return step, torch.cat([start, end], 1)


def _round_step(
    position: Tensor,
    x: Tensor,
    count: int,
    level: Callable[[Tensor], Tensor],
    chance: Tensor | None,
) -> Tensor:
    """Nearest step in companded position, or a random neighbour whose mean value is x."""
    if chance is None:
        return (position + 0.5).to(torch.int64).clamp(max=count - 1)
    step = position.to(torch.int64).clamp(max=count - 2)
    lower = level(step)
    return step + (chance * (level(step + 1) - lower) < x - lower)


def _encode_codebook(
    magnitude: Tensor, finite: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    count = 2 ** (bits - 1)
    step = torch.zeros_like(magnitude, dtype=torch.int64)
    for border in codebook_borders(low, high, bits):
        step += magnitude >= border
    fixed, exponent = fixed_point(magnitude, high)
    fixed = torch.where(finite, fixed, 0)
    step >>= (~finite.all(1, keepdim=True)).to(torch.int64)
    sums = fixed.new_zeros(fixed.shape[0], 2, count)
    sums[:, 0].scatter_add_(1, step, fixed)
    sums[:, 1].scatter_add_(1, step, fixed * fixed)
    mean = sums[:, 1].double() / sums[:, 0].clamp(min=1).double()
    level = torch.ldexp(mean, exponent).to(torch.float32)
    return step, _pattern(_bits(level.to(torch.bfloat16).float()).clamp(max=_TOP))


def codebook_borders(low: Tensor, high: Tensor, bits: int) -> list[Tensor]:
    """The least magnitudes (float32) of the steps 1, 2, ... between a row's least and greatest."""
    count = 2 ** (bits - 1)
    first, last = exact_sqrt(low), exact_sqrt(high)
    if bits == 3:
        first, last = exact_sqrt(first), exact_sqrt(last)
    first, last = first.double(), last.double()
    borders = []
    for j in range(1, count):
        root = first + (last - first) * (j / count)
        border = root * root
        borders.append((border * border if bits == 3 else border).to(torch.float32))
    return borders


def _encode_codebook_stochastic(
    magnitude: Tensor, low: Tensor, high: Tensor, bits: int, chance: Tensor
) -> tuple[Tensor, Tensor]:
    count = 2 ** (bits - 1)
    first, last = lower_bfloat16(low), upper_bfloat16(high)
    inner = _grid(exact_sqrt(low), exact_sqrt(high), _steps(count, low), count)[:, 1:-1]
    inner = inner.to(torch.bfloat16).float().clamp(first, last)
    levels = torch.cat([first, inner, last], 1)
    step = torch.zeros_like(magnitude, dtype=torch.int64)
    for j in range(1, count - 1):
        step += magnitude >= levels[:, j : j + 1]
    lower, upper = levels.gather(1, step), levels.gather(1, step + 1)
    return step + (chance * (upper - lower) < magnitude - lower), levels


def fixed_point(magnitude: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """`magnitude` as integers up to 2**15 in units of 2**exponent, rounded; one exponent a row.

    From the bit pattern, by shifts: exact for subnormals and independent of any rounding mode.
    """
    pattern = _bits(magnitude)
    exponent = (pattern >> 23).clamp(min=1)
    mantissa = (pattern & 0x7FFFFF) | torch.where(pattern >> 23 > 0, 1 << 23, 0)
    largest = (_bits(high) >> 23).clamp(min=1)
    shift = (8 + largest - exponent).clamp(max=31)
    return ((mantissa >> shift) + 1) >> 1, largest - 141


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).to(torch.int64)


def _pattern(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def floor_bfloat16(x: Tensor) -> Tensor:
    """The greatest bfloat16 <= x; the least finite one where there is none."""
    return torch.where(x < 0, -upper_bfloat16(-x), lower_bfloat16(x))


def ceil_bfloat16(x: Tensor) -> Tensor:
    """The least bfloat16 >= x, never -0.0; the greatest finite one where there is none."""
    return torch.where(x < 0, 0.0 - lower_bfloat16(-x), upper_bfloat16(x))


def lower_bfloat16(x: Tensor) -> Tensor:
    """The greatest bfloat16 <= x, for x >= 0."""
    return _pattern(_bits(x) & 0x7FFF0000)


def upper_bfloat16(x: Tensor) -> Tensor:
    """The least finite bfloat16 >= x, for x >= 0; the greatest finite one where there is none."""
    return _pattern(((_bits(x) + 0xFFFF) & 0x7FFF0000).clamp(max=_TOP))
