"""Sound bounds of a chain's slopes to the second order: quadratic forms in float64.

A value over a box is a form in the columns x_i = m_i + r_i ε_i of the box, every ε in [-1, 1],

    c + Σ_i g_i ε_i + Σ_i h_i T(ε_i) + Σ_{i<j} h_ij ε_i ε_j + Σ_s n_s ε_s ± e,    T(ε) = 2ε² - 1

so that each term is within its coefficient. The ε_s are what a curve was off in the few neurons of
a layer where that counts most. σ and σ' are replaced by parabolas over the range of their argument;
of its square, what is linear in the box is squared exactly and the rest bounded. So what is left in
``e`` is of the third order in the width of the box, and what is quadratic cancels between neurons
as what is linear does: in boxes that are small enough to be proved the radius is less than that of
``forms``, with lines, at half of its cost.

For chains of which every σ has a bounded σ''' (``serves``). Rounding is accounted for as there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ranges
from .activations import Activation
from .enclosures import TINY, Slopes, U, box, spread, γ
from .layers import Layers

__all__ = ["MOST_COLUMNS", "by_pytorch", "least", "native", "serves", "slopes"]

KNOTS = 9  # of a parabola along a curve
MOST_COLUMNS = 16  # of a box: terms are as many as pairs of them
SETTLED = 3  # rounds in which columns are found along which a form rises or falls
BENT = (1.0, 0.5, 0.0)  # parabolas that are tried, as shares of the bend of the closest one


class Form(NamedTuple):
    """c (B, H), the coefficients of all terms G (B, S, H) in the order above, and e (B, H)."""

    c: Tensor
    G: Tensor
    e: Tensor


class Parabola(NamedTuple):
    """f(a) = at + slope·(a - c) + bend·(a - c)² ± off, each (B, H), once of (a - c)² only the
    square of what is linear in the box is kept."""

    at: Tensor
    slope: Tensor
    bend: Tensor
    off: Tensor


def serves(layers: Layers) -> bool:
    """Whether every curve of the chain has a bounded third derivative."""
    return all(σ.kind in ranges.THIRD or σ.kind == "identity" for σ in layers.σ)


# --- parabolas along curves ----------------------------------------------------------------------


def _parabola(
    σ: Activation,
    order: int,
    c: Tensor,
    ends: tuple[Tensor, Tensor],
    linear: Tensor,
    rest: Tensor,
) -> Parabola:
    """Along σ (order 0) or σ' (order 1) between the ``ends``, for an a that is c, something linear
    in the box and a rest, both of such a size.

    Any slope and bend will do; between knots 2ρ apart what f is off them lies within ½ρ² max |f'' -
    2 bend| of a straight line. Of (l + δ)² only l² is kept: the more of the rest there is, the
    flatter a parabola is best.
    """
    f = ranges.known_curves(σ)[order]
    lower, upper = ends
    u = torch.linspace(-1, 1, KNOTS, dtype=c.dtype, device=c.device).view(-1, 1, 1)
    away = 0.5 * lower + 0.5 * upper - c
    ρ = (0.5 * upper - 0.5 * lower) * (1 + 4 * U) + 8 * U * (lower.abs() + upper.abs())
    t = torch.addcmul(away, u, ρ)
    at = f.formula(t + c)
    # Closest in the mean, the ends counting more as they do for the largest error.
    w = (1.08 - u * u).rsqrt()
    s_0, s_2, s_4 = w.sum(), (w * u**2).sum(), (w * u**4).sum()
    b_0, b_1, b_2 = ((w * u**i * at).sum(0) for i in range(3))
    slope = (b_1 / (s_2 * ρ)).nan_to_num(0.0, 0.0, 0.0)
    bend = ((s_0 * b_2 - s_2 * b_0) / ((s_0 * s_4 - s_2 * s_2) * ρ * ρ)).nan_to_num(0.0, 0.0, 0.0)
    straight, square = torch.addcmul(at, t, slope, value=-1), t * (t - 2 * away)
    far = away.abs() + ρ
    size = at.abs().amax(0)
    # The knots are rounded, and so is what is computed of them.
    noise = 4 * U * (f.relative * size + f.absolute) + f.slack + 16 * U * (c.abs() + far)
    noise = noise + 16 * U * (size + slope.abs() * far + 3 * bend.abs() * far * far) + TINY
    second = ranges.bounds(σ, 2, lower, upper) if order == 0 else _third(σ, lower, upper, ρ)
    gap = 0.5 * (ρ / (KNOTS - 1)).square()
    # (l + δ)² - l², for |l + δ| is within the ends, too.
    most_far = far * (1 + 8 * U) + 8 * U * c.abs()
    above = torch.where(most_far > rest, rest * (2 * most_far - rest), most_far.square())
    below = torch.where(linear > rest, rest * (2 * linear - rest), linear.square())
    lost, shift = 0.5 * above + 0.5 * below, 0.5 * above - 0.5 * below
    none = torch.zeros_like(c)
    best = Parabola(none, none, none, torch.full_like(c, torch.inf))
    for share in BENT:
        bent = bend * share
        off = torch.addcmul(straight, square, bent, value=-1) if share else straight
        low, high = off.amin(0), off.amax(0)
        twice = 2 * bent
        most = torch.maximum((second[0] - twice).abs(), (second[1] - twice).abs())
        size_ = (0.5 * high - 0.5 * low + most * gap + bent.abs() * lost) * (1 + 16 * U) + noise
        found = Parabola(0.5 * low + 0.5 * high + bent * shift, slope - twice * away, bent, size_)
        closer = found.off < best.off  # no NaN is
        best = Parabola(*(torch.where(closer, a, b) for a, b in zip(found, best, strict=True)))
    return best


def _third(σ: Activation, lower: Tensor, upper: Tensor, ρ: Tensor) -> tuple[Tensor, Tensor]:
    """Both bounds of σ''' between ends 2ρ apart: no further than 2ρ max |σ''''| from its mean, the
    difference of σ'' between both, and within those it has everywhere."""
    f, (third, fourth) = ranges.known_curves(σ)[2], ranges.THIRD[σ.kind]
    ends = f.formula(torch.stack((lower, upper)))
    off = 4 * U * (f.relative * ends.abs().amax(0) + f.absolute) + f.slack
    mean = (ends[1] - ends[0]) / (2 * ρ)
    off = (off + 8 * U * ends.abs().amax(0)) / ρ + 2 * fourth * ρ * (1 + 8 * U)
    off = off + 16 * U * mean.abs()
    low, high = (mean - off).nan_to_num(-third), (mean + off).nan_to_num(third)
    return low.clamp(-third, third), high.clamp(-third, third)


# --- forms ---------------------------------------------------------------------------------------


def _sizes(form: Form, m: int) -> tuple[Tensor, Tensor]:
    """How large what is linear in the box can be, and all else but c, (B, H) each."""
    size = form.G.abs()
    more = 1 + 2 * (size.shape[1] + 2) * U
    return size[:, :m].sum(1) * more, (size[:, m:].sum(1) + form.e) * more


def least(g: Tensor, h: Tensor) -> Tensor:
    """The least value of g ε + h T(ε)."""
    size = g.abs()
    inside = size < 4 * h
    return torch.where(inside, -(size * size) / (8 * h).where(inside, 1.0) - h, h - size)


def _ends(form: Form, m: int, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Both bounds of a form of which ``rest`` is the size of all that is not linear.

    Both are at the ends of each column along which it rises or falls everywhere; there the pairs of
    such columns are the same number."""
    g, h, pairs = form.G[:, :m], form.G[:, m : 2 * m], form.G[:, 2 * m : _terms(m)]
    size, (i, j) = pairs.abs(), torch.triu_indices(m, m, 1, device=g.device)
    moves = (4 * h.abs()).index_add_(1, i, size).index_add_(1, j, size)
    sign = torch.where(g.abs() >= moves * (1 + 4 * (m + 2) * U), g.sign(), 0.0)
    both = sign[:, i] * sign[:, j]
    shift = (both * pairs).sum(1)
    others = (rest - h.abs().sum(1) - (both.abs() * size).sum(1)).clamp(min=0)
    low, high = least(g, h).sum(1), least(g, -h).sum(1)
    rounding = (form.c.abs() + rest - low - high) * (4 * (_terms(m) + 8) * U)
    return form.c + low + shift - others - rounding, form.c - high + shift + others + rounding


def _add_products(G: Tensor, c: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds (Σ_i a_i ε_i)(Σ_j b_j ε_j) to the form of c and G, a and b (B, m, H)."""
    m = a.shape[1]
    half = (a * b).mul_(0.5)
    G[:, m : 2 * m] += half
    c += half.sum(1)
    first = 2 * m
    for i in range(m - 1):
        pairs = G[:, first : first + m - 1 - i]
        pairs.addcmul_(a[:, i : i + 1], b[:, i + 1 :])
        pairs.addcmul_(a[:, i + 1 :], b[:, i : i + 1])
        first += m - 1 - i


def _symmetric(pairs: Tensor, m: int) -> Tensor:
    """The coefficients (B, K, m, m) of ε_i ε_j, from those of the pairs (B, m (m - 1) / 2, K)."""
    i, j = torch.triu_indices(m, m, 1, device=pairs.device)
    H = pairs.new_zeros(len(pairs), pairs.shape[2], m, m)
    H[:, :, i, j] = H[:, :, j, i] = pairs.mT
    return H


def _least_of(g: Tensor, h: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """A lower bound (B, K) of Σ_i (g_i ε_i + h_i T(ε_i)) + ½ εᵀHε for g and h (B, m, K) and H
    (B, K, m, m), rounded down; and a 1 (B, K, m) for each column that is not known to rise or fall.

    Where the derivative by ε_i has one sign everywhere, the least value is at that end of it, which
    leaves a form in the other columns, of which more may have one.
    """
    g, h = g.mT, h.mT
    m = g.shape[2]
    at, open_ = torch.zeros_like(g), torch.ones_like(g)
    first = open_
    for i in range(SETTLED):
        slope = g + (H @ at.unsqueeze(3)).squeeze(3)
        moves = 4 * h.abs() + (H.abs() @ open_.unsqueeze(3)).squeeze(3)
        settles = (slope.abs() >= moves) & (open_ > 0)
        at = torch.where(settles, -slope.sign(), at)
        open_ = torch.where(settles, 0.0, open_)
        first = open_ if i == 0 else first
    slope = g + (H @ at.unsqueeze(3)).squeeze(3)
    ends = torch.where(open_ > 0, least(slope, h), g * at + h).sum(2)
    settled = 0.5 * (at.unsqueeze(2) @ H @ at.unsqueeze(3)).flatten(1)
    others = 0.5 * (open_.unsqueeze(2) @ H.abs() @ open_.unsqueeze(3)).flatten(1)
    size = (g.abs() + h.abs()).sum(2) + H.abs().sum((2, 3))
    return ends + settled - others - (4 * (m * m + 16) * U) * size, first


def _along(a: Form, f: Parabola, m: int, linear: Tensor, rest: Tensor) -> Form:
    """f(a)."""
    g = a.G[:, :m]
    c, G = f.at.clone(), a.G * f.slope.unsqueeze(1)
    _add_products(G, c, g, g * f.bend.unsqueeze(1))
    size = f.at.abs() + f.slope.abs() * (linear + rest) + 2 * f.bend.abs() * linear.square()
    e = f.slope.abs() * a.e + f.off
    return Form(c, G, e + ((16 + 2 * m) * U) * (size + e) + TINY)


def _through(
    h: Form, W: Tensor, layers: Layers, b: Tensor | None, m: int, keep: bool
) -> tuple[Form, Tensor | None]:
    """W h + b, W (out, in). With ``keep`` what h was off in some neurons becomes an ε of theirs:
    the last terms, and which neurons (B, n)."""
    γ_n = γ(W.shape[1] + 2 + layers.folded)
    linear, rest = _sizes(h, m)
    rounding = γ_n * (h.c.abs() + linear + rest)
    c = h.c @ W.mT if b is None else torch.addmm(b, h.c, W.mT)
    G, left, top = h.G @ W.mT, h.e, None
    if keep and G.shape[1]:
        counts = h.e * W.abs().sum(0)
        top = counts.topk(min(_followed(m), counts.shape[1]), 1, sorted=False).indices
        G = torch.cat((G, left.gather(1, top).unsqueeze(2) * W.mT[top]), 1)
        left = left.scatter(1, top, 0.0)
    e = ((left + rounding) @ W.abs().mT) * (1 + 2 * γ_n) + TINY
    return Form(c, G, e if b is None else e + γ_n * (b.abs() + c.abs())), top


def _shares(first: Form, m: int) -> Tensor:
    """How much of the argument of each neuron, as far as it is linear in the box, is that of each
    column, (B, m, H); of σ' it is the same."""
    size = first.G[:, :m].abs()
    return size / (size.sum(1, keepdim=True) + TINY)


def _product(P: Form, s: Form, m: int) -> Form:
    """P∘s; the terms of s are the first of those of P, which has none where it is a constant."""
    (l_P, r_P), (l_s, r_s) = _sizes(P, m), _sizes(s, m)
    c = P.c * s.c
    if P.G.shape[1]:
        G = P.G * s.c.unsqueeze(1)
        G[:, : s.G.shape[1]].addcmul_(s.G, P.c.unsqueeze(1))
        _add_products(G, c, P.G[:, :m], s.G[:, :m])
    else:
        G = s.G * P.c.unsqueeze(1)
    e = s.c.abs() * P.e + P.c.abs() * s.e + l_P * r_s + r_P * (l_s + r_s)
    size = (P.c.abs() + l_P + r_P) * (s.c.abs() + l_s + r_s)
    return Form(c, G, e + ((16 + 2 * m) * U) * (size + e) + TINY)


def _contracted(P: Form, s: Form, W: Tensor, layers: Layers, m: int) -> tuple[Form, Tensor]:
    """Wᵀ(P∘s) for W (H, K), the first layer's, where s has no ε of neurons; and how much of its
    error comes from each column, (B, m, K).

    Here the products of what is linear in s with every term of P, and of what is linear in P with
    what is quadratic in s, are computed for each output, so that the neurons cancel.
    """
    K, H = W.shape[1], W.shape[0]
    γ_n = γ(H + 4 + layers.folded)
    Q = s.G.shape[1] - m  # terms of second order
    if not P.G.shape[1]:
        P = P._replace(G=torch.zeros_like(s.G))
    (l_P, r_P), (l_s, r_s) = _sizes(P, m), _sizes(s, m)
    G = P.G * s.c.unsqueeze(1)
    G[:, : m + Q].addcmul_(s.G, P.c.unsqueeze(1))
    lumped = s.c.abs() * P.e + P.c.abs() * s.e + l_P * s.e + P.e * l_s + r_P * r_s
    rounding = (P.c.abs() + l_P + r_P) * (s.c.abs() + l_s + r_s) * (4 * γ_n) + TINY
    lumped = lumped * (1 + 16 * U) + rounding
    e = (lumped @ W.abs()) * (1 + 2 * γ_n)
    c, G = (P.c * s.c) @ W, G @ W
    blame = (_shares(s, m) * lumped.unsqueeze(1)) @ W.abs()
    first, second = torch.triu_indices(m, m, 1, device=W.device)
    for k in range(K):
        M = P.G @ (s.G[:, :m] * W[:, k]).mT  # (B, S, m)
        square = M[:, :m]
        half = 0.5 * square.diagonal(dim1=1, dim2=2)
        c[:, k] += half.sum(1)
        G[:, m : 2 * m, k] += half
        G[:, 2 * m : m + Q, k] += square[:, first, second] + square[:, second, first]
        M[:, m : m + Q] += ((P.G[:, :m] * W[:, k]) @ s.G[:, m:].mT).mT
        size = M[:, m:].abs().sum(1)
        e[:, k] += size.sum(1) * (1 + 4 * (M.shape[1] + m) * U)
        blame[:, :, k] += size
    return Form(c, G, e), blame


def _terms(m: int) -> int:
    """How many a form has of the box's own."""
    return 2 * m + m * (m - 1) // 2


def _known(whose: Tensor, h: Form, first: Form | None, top: Tensor | None, m: int) -> Tensor:
    """``whose`` (B, m, n) with the shares of those neurons ``top`` of h that got an ε."""
    if top is None:
        return whose
    shares = whose.new_zeros(len(h.c), m, h.c.shape[1]) if first is None else _shares(first, m)
    at = top.unsqueeze(1).expand(-1, m, -1)
    return torch.cat((whose[:, :, : h.G.shape[1] - _terms(m)], shares.gather(2, at)), 2)


def _followed(m: int) -> int:
    """How many neurons of a layer get an ε of their own."""
    return 8 + _terms(m) // 3


def native(like: Tensor) -> bool:
    """Whether the library bounds boxes where that tensor is."""
    from .backends import cpu  # the library is opened when it is first of use

    return like.device.type == "cpu" and not cpu.missing()


def slopes(
    layers: Layers,
    c: Tensor,
    r: Tensor,
    moving: Tensor,
    output: int,
    columns: Tensor,
    wanted: Tensor | None = None,
) -> Slopes:
    """Forms of ∂y_output/∂x for the K ``columns`` over the boxes c ± r (B, d), float64, that have
    an extent in the m ``moving`` columns alone. What is not finite has an infinite error, and so
    may have what is not ``wanted`` (B, K).

    By ``csrc/quadratic.h`` where the native library was built, else by PyTorch's operations.
    """
    if native(c):
        from .backends import cpu

        return cpu.chain_slopes(layers, c, r, moving, output, columns, wanted)
    return by_pytorch(layers, c, r, moving, output, columns)


def by_pytorch(
    layers: Layers, c: Tensor, r: Tensor, moving: Tensor, output: int, columns: Tensor
) -> Slopes:
    """As ``slopes``, which it is the reference of."""
    m, L, T = len(moving), len(layers.W), _terms(len(moving))
    h = Form(c, *box(c, r, moving, T))
    whose = c.new_zeros(len(c), m, 0)  # is what each neuron with an ε of its own was off
    first: list[Form | None] = []
    for l, (W, b, σ) in enumerate(zip(layers.W, layers.b, layers.σ, strict=True)):
        if l == L - 1:
            if σ.kind == "identity":
                first.append(None)
                break
            W, b = W[output : output + 1], b[output : output + 1]
        a, top = _through(h, W, layers, b, m, l > 0)
        whose = _known(whose, h, first[l - 1] if l else None, top, m)
        if σ.kind == "identity":
            first.append(None)
            h = a
            continue
        linear, rest = _sizes(a, m)
        ends = _ends(a, m, rest)
        slope = _parabola(σ, 1, a.c, ends, linear, rest)
        first.append(_along(a, slope, m, linear, rest))
        if l < L - 1:
            h = _along(a, _parabola(σ, 0, a.c, ends, linear, rest), m, linear, rest)
    P = Form(c.new_ones(len(c), 1), c.new_zeros(len(c), 0, 1), c.new_zeros(len(c), 1))
    blame: Tensor | None = None
    for l in range(L - 1, -1, -1):
        W, s = layers.W[l], first[l]
        if l == L - 1:
            W = W[output : output + 1]
        if l == 0:
            W = W[:, columns]
        if s is not None and l == 0:
            P, blame = _contracted(P, s, W, layers, m)
            break
        p = P if s is None else _product(P, s, m)
        P, top = _through(p, W.mT, layers, None, m, l > 0)
        whose = _known(whose, p, s, top, m)
    if not P.G.shape[1]:
        P = P._replace(G=c.new_zeros(len(c), T, P.c.shape[1]))
    pairs = P.G[:, 2 * m : T]
    third = (P.G[:, T:].abs().sum(1) + P.e) * (1 + 2 * (P.G.shape[1] + 2) * U)
    error = (pairs.abs().sum(1) + third) * (1 + 2 * (pairs.shape[1] + 2) * U)
    slant, bend = P.G[:, :m], P.G[:, m : 2 * m]
    H = _symmetric(pairs, m)
    low, open_ = _least_of(slant, bend, H)
    high, _ = _least_of(-slant, -bend, -H)
    blame = torch.zeros_like(slant) if blame is None else blame
    size = H.abs()
    tied = (size @ open_.unsqueeze(3)).squeeze(3)  # to what is not known to rise or fall
    neurons = P.G[:, T:].abs()
    blame = blame + whose[:, :, : neurons.shape[1]] @ neurons
    blame = blame + (open_ * (2 * bend.mT.abs() + 0.5 * tied)).mT
    rise = (slant.abs() - 4 * bend.abs() - size.sum(3).mT).clamp(min=0)
    known = torch.isfinite(P.c) & torch.isfinite(error) & torch.isfinite(P.G[:, : 2 * m]).all(1)
    every = known.unsqueeze(1)
    return Slopes(
        torch.where(known, P.c, 0.0),
        spread(torch.where(every, slant, 0.0), moving, layers.d),
        spread(torch.where(every, bend, 0.0), moving, layers.d),
        torch.where(known, error, torch.inf),
        spread(torch.where(every, rise, 0.0), moving, layers.d),
        spread(blame.nan_to_num(1.0, 1.0), moving, layers.d),
        torch.where(known, P.c + low - third - 4 * U * (P.c.abs() - low + third), -torch.inf),
        torch.where(known, P.c - high + third + 4 * U * (P.c.abs() - high + third), torch.inf),
    )
