"""Sound bounds of a chain's slopes to the second order: quadratic forms in float64.

A value over a box is a form in the columns x_i = m_i + r_i ε_i of the box, every ε in [-1, 1],

    c + Σ_i g_i ε_i + Σ_i h_i T(ε_i) + Σ_{i<j} h_ij ε_i ε_j ± e,    T(ε) = 2ε² - 1

so that each term is within its coefficient. σ and σ' are replaced by parabolas over the range of
their argument, of which a form keeps what is linear and quadratic in ε. What is left is not carried
from layer to layer by its size, in which nothing cancels: it is traced to where it arises. With P_l
for what the adjoint recursion makes of forms alone, a slope is off by

    Σ_l ⟨t_l, P_l (s_l - ŝ_l) + (P_l ŝ_l - p̂_l)⟩

over the layers: s_l = σ'(a_l) and ŝ_l its form, p̂_l the form of P_l ŝ_l, and t_l, the tangent of
a_l along the column, is how much the slope changes with p_l. s_l is off by what the parabola is, by
the products of what is linear and what is quadratic in a_l, and by what a_l is off, which comes
from σ of the layers before in the same way: with h_l = σ(a_l) the slope changes by q_h, and with
a_l by q_a, the chain of the curvature alone. These ``Weights`` of the slope are known to the first
order in ε. So what is of the third order, but for that of the parabolas, is one polynomial for each
slope, in which neurons and layers cancel.

For chains of which every σ has a bounded σ''' (``serves``). Rounding is accounted for as in
``forms``.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """f(a) = at + slope·t + bend·t² ± off, t = a - c, each (B, H)."""

    at: Tensor
    slope: Tensor
    bend: Tensor
    off: Tensor


def serves(layers: Layers) -> bool:
    """Whether every curve of the chain has a bounded third derivative."""
    return all(σ.kind in ranges.THIRD or σ.kind == "identity" for σ in layers.σ)


# --- parabolas along curves ----------------------------------------------------------------------


def _parabola(
    σ: Activation, order: int, c: Tensor, ends: tuple[Tensor, Tensor], lost: Tensor
) -> Parabola:
    """Along σ (order 0) or σ' (order 1) between the ``ends``.

    Any slope and bend will do; between knots 2ρ apart what f is off them lies within ½ρ² max |f'' -
    2 bend| of a straight line. Of t² a part of the size ``lost`` is an error to a form: the larger
    it is, the flatter a parabola is best.
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
    none = torch.zeros_like(c)
    best = Parabola(none, none, none, torch.full_like(c, torch.inf))
    least = best.off
    for share in BENT:
        bent = bend * share
        off = torch.addcmul(straight, square, bent, value=-1) if share else straight
        low, high = off.amin(0), off.amax(0)
        twice = 2 * bent
        most = torch.maximum((second[0] - twice).abs(), (second[1] - twice).abs())
        size_ = (0.5 * high - 0.5 * low + most * gap) * (1 + 16 * U) + noise
        found = Parabola(0.5 * low + 0.5 * high, slope - twice * away, bent, size_)
        all_ = size_ + bent.abs() * lost
        closer = all_ < least  # no NaN is
        best = Parabola(*(torch.where(closer, a, b) for a, b in zip(found, best, strict=True)))
        least = torch.where(closer, all_, least)
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
    """How large what is linear in the box can be, and what is quadratic, (B, H) each."""
    size = form.G.abs()
    more = 1 + 2 * (size.shape[1] + 2) * U
    return size[:, :m].sum(1) * more, size[:, m:].sum(1) * more


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


class Curved(NamedTuple):
    """σ or σ' of an a: ``form``, whose e is all that it is off, and the sizes of its parts; of its
    parabola the slope and the bend, and how much, for an a that is its form exactly, it is off
    (``all``), how much of that is not 2·bend times what is linear in a times what is quadratic
    (``left``); how much it changes with a, at most (``steep``), and how large it is (``whole``)."""

    form: Form
    linear: Tensor
    bent: Tensor
    slope: Tensor
    bend: Tensor
    all: Tensor
    left: Tensor
    steep: Tensor
    whole: Tensor


def _along(a: Form, σ: Activation, order: int, m: int) -> Curved:
    """(l + q)², with l what is linear in a and q what is quadratic, is l² + 2 l q and at most q²
    more, which lies around a half of its largest value."""
    linear, bent = _sizes(a, m)
    square = 0.5 * bent.square()
    lost = 2 * linear * bent + square
    f = _parabola(σ, order, a.c, _ends(a, m, bent + a.e), lost)
    g, bend = a.G[:, :m], f.bend.abs()
    c, G = f.at + f.bend * square, a.G * f.slope.unsqueeze(1)
    _add_products(G, c, g, g * f.bend.unsqueeze(1))
    all_, left = (f.off + bend * of for of in (lost, square))
    steep = f.slope.abs() + bend * (2 * (linear + bent) + a.e)
    form = Form(c, G, steep * a.e)
    whole = c.abs() + f.at.abs() + steep * (linear + bent + a.e) + all_
    e = (form.e + all_) * (1 + 16 * U) + (16 + 2 * m) * U * whole + TINY
    return Curved(form._replace(e=e), *_sizes(form, m), f.slope, f.bend, all_, left, steep, whole)


def _through(h: Form, W: Tensor, layers: Layers, b: Tensor, m: int) -> Form:
    """W h + b, W (out, in)."""
    γ_n = γ(W.shape[1] + 2 + layers.folded)
    linear, bent = _sizes(h, m)
    rounding = γ_n * (h.c.abs() + linear + bent + h.e)
    c = torch.addmm(b, h.c, W.mT)
    e = ((h.e + rounding) @ W.abs().mT) * (1 + 2 * γ_n) + TINY
    return Form(c, h.G @ W.mT, e + γ_n * (b.abs() + c.abs()))


class Weights(NamedTuple):
    """How much each of K slopes changes with a row of neurons, as far as that is known: at (B, K,
    H), what is linear in the box, (B, K, m, H), and the size of all else; and how large those of
    any slope are in any case, (B, H)."""

    at: Tensor
    linear: Tensor
    rest: Tensor
    whole: Tensor

    def varies(self) -> Tensor:
        return self.linear.abs().sum(2) + self.rest

    def through(self, W: Tensor, layers: Layers, m: int) -> Weights:
        """Those times W (H, out)."""
        off, sizes = _off(layers, W.shape[0], m), W.abs()
        whole = (self.whole @ sizes) * (1 + 2 * off) + TINY
        rest = (self.rest @ sizes) * (1 + 2 * off) + off * whole.unsqueeze(1) + TINY
        return Weights(self.at @ W, self.linear @ W, rest, whole)

    def times(self, s: Curved, m: int) -> Weights:
        """Those times s, at every point of the box."""
        c, g = s.form.c.unsqueeze(1), s.form.G[:, :m].unsqueeze(1)
        s_linear, s_rest = s.linear.unsqueeze(1), (s.bent + s.form.e).unsqueeze(1)
        size, varies = self.at.abs(), self.varies()
        return Weights(
            self.at * c,
            self.linear * c.unsqueeze(2) + g * self.at.unsqueeze(2),
            self.rest * c.abs() + s_linear * varies + s_rest * (size + varies),
            self.whole * s.whole,
        )


def _off(layers: Layers, n: int, m: int) -> float:
    """What n products and all that goes before and after them may be rounded by."""
    return 4 * γ(n + m * m + 32 + layers.folded)


def _add_cubic(M: Tensor, weight: Tensor, linear: Tensor, quadratic: Tensor) -> None:
    """Adds the products of what is ``linear`` (B, m, H) and ``quadratic`` (B, Q, H) to M (B, K, Q,
    m), weighted by (B, K, H)."""
    M += quadratic.unsqueeze(1) @ (weight.unsqueeze(2) * linear.unsqueeze(1)).mT


def _exact(c: Tensor, G: Tensor) -> Form:
    """A form of which all that it is off is accounted for elsewhere."""
    return Form(c, G, torch.zeros_like(c))


def _each(x: Tensor) -> Tensor:
    """The same for each of the slopes."""
    return x.unsqueeze(1)


class Met(NamedTuple):
    """P∘σ' as a form, what it adds to how much the slopes change with a, and to their error, (B, K,
    H)."""

    p: Form
    q_a: Weights
    error: Tensor


def _met(
    a: Form,
    s: Curved,
    v: Curved | None,
    P: Form,
    t: Weights,
    q_h: Weights | None,
    M: Tensor,
    m: int,
) -> Met:
    """Where P and s = σ'(a) meet, and σ(a) = v, on which the slopes depend by q_h. What is of the
    third order goes into M."""
    (l_P, r_P), p = _sizes(P, m), P.c
    g, g_P = a.G[:, :m], P.G[:, :m]
    c, G = p * s.form.c, P.G * _each(s.form.c) + s.form.G * _each(p)
    _add_products(G, c, g_P, s.form.G[:, :m])
    # P t, the weight of s.
    size, varies = t.at.abs(), t.varies()
    at = t.at * _each(p)
    linear = t.at.unsqueeze(2) * _each(g_P) + t.linear * _each(_each(p))
    rest = size * _each(r_P) + varies * _each(l_P + r_P) + t.rest * _each(p.abs())
    w = Weights(at, linear, rest, t.whole * (p.abs() + l_P + r_P))
    error = size * _each(r_P * s.bent)
    error = error + varies * _each(l_P * s.bent + r_P * (s.linear + s.bent))
    error = error + at.abs() * _each(s.left) + w.varies() * _each(s.all)
    bends = at * _each(2 * s.bend)
    q_a = _rate(w, a, s, m)
    if q_h is not None and v is not None:
        error = error + q_h.at.abs() * _each(v.left) + q_h.varies() * _each(v.all)
        bends = bends + q_h.at * _each(2 * v.bend)
        q_a = Weights(*(x + y for x, y in zip(q_a, _rate(q_h, a, v, m), strict=True)))
    _add_cubic(M, bends, g, a.G[:, m:])
    _add_cubic(M, t.at, s.form.G[:, :m], P.G[:, m:])
    _add_cubic(M, t.at, g_P, s.form.G[:, m:])
    return Met(_exact(c, G), q_a, error)


def _rate(w: Weights, a: Form, f: Curved, m: int) -> Weights:
    """The weights of E, what a = c + l + q + E is off, for those w of f(a):
    w (slope + bend (2 l + 2 q + E))."""
    linear, bent = _sizes(a, m)
    slope, bend, varies = _each(f.slope), _each(f.bend), w.varies()
    rest = 2 * _each(linear) * varies + _each(2 * bent + a.e) * (w.at.abs() + varies)
    return Weights(
        w.at * slope,
        w.linear * slope.unsqueeze(2) + 2 * (w.at * bend).unsqueeze(2) * _each(a.G[:, :m]),
        w.rest * slope.abs() + rest * bend.abs(),
        w.whole * f.steep,
    )


def _reduced(M: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is cubic, Σ M_ri ε_i times the r-th quadratic term, for M (B, K, Q, m): what of it is
    linear (B, K, m), the size of the rest (B, K), and what of that goes with each column (B, K, m).

    ε T(ε) and ε_i ε_i ε_j are half an ε and half something within 1, and the three ways to
    come by ε_i ε_j ε_k are one number.
    """
    A, pairs = M[:, :, :m].mT.clone(), M[:, :, m:]  # A: of ε_i T(ε_j)
    i, j = torch.triu_indices(m, m, 1, device=M.device)
    n = torch.arange(len(i), device=M.device)
    linear = 0.5 * A.diagonal(dim1=2, dim2=3)
    A.diagonal(dim1=2, dim2=3).mul_(0.5)
    for one, other in ((i, j), (j, i)):
        half = 0.5 * pairs[:, :, n, other]  # of ε_one ε_other²
        linear = linear.index_add(2, one, half)
        A[:, :, one, other] += half
    size = A.abs()
    total, shares = size.sum((2, 3)), size.sum(3) + 2 * size.sum(2)
    place = n.new_zeros(m, m)
    place[i, j] = place[j, i] = n
    x, y, z = torch.combinations(torch.arange(m, device=M.device), 3).view(-1, 3).unbind(1)
    size = (
        pairs[:, :, place[y, z], x] + pairs[:, :, place[x, z], y] + pairs[:, :, place[x, y], z]
    ).abs()
    for column in (x, y, z):
        shares = shares.index_add(2, column, size)
    return linear, total + size.sum(2), shares


def _terms(m: int) -> int:
    """How many a form has."""
    return 2 * m + m * (m - 1) // 2


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
    m = len(moving)
    last = slice(output, output + 1)
    W, b = [*layers.W[:-1], layers.W[-1][last]], [*layers.b[:-1], layers.b[-1][last]]
    way = _forward(layers, W, b, Form(c, *box(c, r, moving, _terms(m))), columns, m)
    return _known(*_backward(layers, W, b, way, columns, m), moving, layers.d)


class Layer(NamedTuple):
    """Of one layer, on the way forward: the form of a, σ' and σ along it, None where σ is the
    identity and σ of the last, and how much the slopes change with σ' ∘ P."""

    a: Form
    s: Curved | None
    v: Curved | None
    t: Weights


def _forward(
    layers: Layers, W: Sequence[Tensor], b: Sequence[Tensor], h: Form, columns: Tensor, m: int
) -> list[Layer]:
    """The layers, from x as the form h on."""
    B, K, start = len(h.c), len(columns), W[0][:, columns].mT
    t = Weights(
        start.expand(B, K, -1),
        start.new_zeros(B, K, m, len(W[0])),
        start.new_zeros(B, K, len(W[0])),
        start.abs().amax(0).expand(B, -1),
    )
    way = list[Layer]()
    for l, σ in enumerate(layers.σ):
        if way:
            before = way[-1].s
            t = (t if before is None else t.times(before, m)).through(W[l].mT, layers, m)
        a = _through(h, W[l], layers, b[l], m)
        curved = σ.kind != "identity"
        s = _along(a, σ, 1, m) if curved else None
        v = _along(a, σ, 0, m) if curved and l < len(W) - 1 else None
        way.append(Layer(a, s, v, t))
        h = a if v is None else v.form
    return way


class Cubic(NamedTuple):
    """Of the slopes what is not in their form: M (B, K, Q, m) as for ``_reduced``, the size of
    all else, (B, K), and what of that goes with each column, (B, K, m)."""

    M: Tensor
    error: Tensor
    blame: Tensor


def _backward(
    layers: Layers,
    W: Sequence[Tensor],
    b: Sequence[Tensor],
    way: Sequence[Layer],
    columns: Tensor,
    m: int,
) -> tuple[Form, Cubic]:
    """The slopes' own form, and what they are off it."""
    like, K, T = way[0].a.c, len(columns), _terms(m)
    B = len(like)
    P = _exact(like.new_ones(B, 1), like.new_zeros(B, T, 1))
    q_h: Weights | None = None
    M, rounding = like.new_zeros(B, K, T - m, m), like.new_zeros(B)
    error, blame = like.new_zeros(B, K), like.new_zeros(B, K, m)
    for l in range(len(W) - 1, -1, -1):
        a, s, v, t = way[l]
        q_a, p = q_h, P
        if s is not None:
            p, q_a, off = _met(a, s, v, P, t, q_h, M, m)
            linear, _ = _sizes(a, m)
            error += off.sum(2)
            blame += off @ (a.G[:, :m].abs() / (linear + TINY).unsqueeze(1)).mT
        rounding += _rounding(way[l], P, q_h, q_a, b[l], _off(layers, max(W[l].shape), m), m)
        if l == 0 and q_a is not None:
            rounding += (q_a.whole * a.e).sum(1)
        q_h = q_a.through(W[l], layers, m) if l and q_a is not None else None
        back = W[l] if l else W[l][:, columns]
        P = _exact(p.c @ back, p.G @ back)
    return P, Cubic(M, error + rounding.unsqueeze(1), blame)


def _rounding(
    layer: Layer, P: Form, q_h: Weights | None, q_a: Weights | None, b: Tensor, off: float, m: int
) -> Tensor:
    """What the slopes may be off by the rounding of a layer, (B,); ``off`` as ``_off`` has it."""
    a, s, v, t = layer
    linear, bent = _sizes(a, m)
    l_P, r_P = _sizes(P, m)
    whole, value = P.c.abs() + l_P + r_P, a.c.abs() + linear + bent + a.e
    if s is not None:
        whole = whole * s.whole
    if v is not None:
        value = v.whole
    rounding = (t.whole * whole).sum(1) * (2 * off)
    if q_h is not None:
        rounding += (q_h.whole * value).sum(1) * (2 * off)
    if q_a is not None:
        rounding += (q_a.whole * (a.c.abs() + b.abs())).sum(1) * off
    return rounding


def _known(form: Form, cubic: Cubic, moving: Tensor, d: int) -> Slopes:
    """What the slopes' form, and what they are off it, say of them."""
    m = len(moving)
    T = _terms(m)
    slant, third, shares = _reduced(cubic.M, m)
    G = form.G.clone()
    G[:, :m] += slant.mT
    third = third + cubic.error * (1 + 1e-9) + TINY
    third = third * (1 + 4 * (T + 2) * (m + 2) * U)
    pairs = G[:, 2 * m : T]
    error = (pairs.abs().sum(1) + third) * (1 + 2 * (pairs.shape[1] + 2) * U)
    slant, bend = G[:, :m], G[:, m : 2 * m]
    H = _symmetric(pairs, m)
    low, open_ = _least_of(slant, bend, H)
    high, _ = _least_of(-slant, -bend, -H)
    size = H.abs()
    tied = (size @ open_.unsqueeze(3)).squeeze(3)  # to what is not known to rise or fall
    blame = (cubic.blame + shares + open_ * (2 * bend.mT.abs() + 0.5 * tied)).mT
    rise = (slant.abs() - 4 * bend.abs() - size.sum(3).mT).clamp(min=0)
    c = form.c
    known = torch.isfinite(c) & torch.isfinite(error) & torch.isfinite(G[:, : 2 * m]).all(1)
    every = known.unsqueeze(1)
    return Slopes(
        torch.where(known, c, 0.0),
        spread(torch.where(every, slant, 0.0), moving, d),
        spread(torch.where(every, bend, 0.0), moving, d),
        torch.where(known, error, torch.inf),
        spread(torch.where(every, rise, 0.0), moving, d),
        spread(blame.nan_to_num(1.0, 1.0), moving, d),
        torch.where(known, c + low - third - 4 * U * (c.abs() - low + third), -torch.inf),
        torch.where(known, c - high + third + 4 * U * (c.abs() - high + third), torch.inf),
    )
