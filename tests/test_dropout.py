"""The mask of active dropouts: the generator, its key, and that every backend draws the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monokernel import dropout, fused_mono_penalty, plan, value_and_jacobian
from monokernel.backends import cpu, handwritten, reference
from monokernel.problem import Problem
from monokernel.program import Node

WIDTHS = (1, 3, 4, 20, 33, 64, 131)


def words(counter: list[int], key: tuple[int, int], rounds: int) -> list[int]:
    """Philox4x32 in plain integers, as Salmon et al. (2011) write it."""
    c, (k0, k1) = list(counter), key
    for _ in range(rounds):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (p1 >> 32) ^ c[1] ^ k0,
            p1 % 2**32,
            (p0 >> 32) ^ c[3] ^ k1,
            p0 % 2**32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def test_the_generator_gives_the_published_words() -> None:
    """The known answers of Random123 for a counter and a key of zeros."""
    nothing = [torch.zeros(1, dtype=torch.int64)] * 4
    zero = torch.tensor(0)
    for rounds, want in (
        (7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ):
        assert [int(w) for w in dropout.philox(nothing, zero, zero, rounds)] == want
        assert words([0, 0, 0, 0], (0, 0), rounds) == want


@pytest.mark.parametrize("width", WIDTHS)
def test_the_mask_is_the_generators(width: int) -> None:
    """Bytes of the key, both halves of a row's number, the order of the columns."""
    key, p, number = [7, 0, 255, 1, 128, 200, 3, 99], 0.3, 5
    k = tuple(sum(b << 8 * i for i, b in enumerate(key[h : h + 4])) for h in (0, 4))
    rows = [0, 1, 77, 2**32 + 3]
    got = dropout.mask(
        torch.tensor(key), number, torch.tensor(rows), width, p, torch.float64
    ).tolist()
    groups = -(-width // 4)
    for i, row in enumerate(rows):
        for j in range(width):
            word, c = divmod(j, groups)
            drawn = words([row % 2**32, row >> 32, c, number], k, dropout.ROUNDS)[word]  # type: ignore[arg-type]
            assert got[i][j] == (1 / (1 - p) if drawn >= int(p * 2**32) else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_every_backend_draws_the_same(dtype: torch.dtype, p: float) -> None:
    for width in WIDTHS:
        x = torch.rand(203, width).to(dtype) + 1
        key = dropout.draw_key(x)
        problem = Problem(
            width, (Node("dropout", (0,), (0,), (p, 3.0), width),), (0,), "adjoint", None
        )
        want, slopes = reference.value_and_jacobian(problem, x, [key])
        for backend in (handwritten, cpu):
            if backend.refuses(problem, x):
                continue
            y, J, _ = backend.forward(problem, x, None, [key], False)
            torch.testing.assert_close(y, want)
            close = {"rtol": 2e-3, "atol": 0.0} if dtype.itemsize == 2 else {}
            torch.testing.assert_close(J, slopes, **close)
        assert ((want == 0).double().mean() - p).abs() < 0.06 or width < 20


def test_columns_rows_and_dropouts_know_nothing_of_each_other() -> None:
    key = dropout.draw_key(torch.ones(1))
    rows = torch.arange(4000)
    first, second = (dropout.mask(key, n, rows, 40, 0.5, torch.float64) - 1 for n in (0, 1))
    for a, b in ((first, second), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:])):
        n = a.numel()
        assert (a * b).mean().abs() < 5 / n**0.5
    each = first.mean(0).abs().max(), first.mean(1).abs().max() * (40 / 4000) ** 0.5
    assert max(each) < 5 / 4000**0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 24), nn.Linear(24, 24), nn.Linear(24, 1)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.a(x)))
        y: Tensor = self.c(h + self.drop(torch.tanh(self.b(h))))
        return y


def test_two_dropouts_of_a_network_draw_two_masks() -> None:
    x1, x2 = torch.ones(500, 2), torch.ones(500, 1)
    twice = nn.Sequential(nn.Dropout(0.5), Twice())
    y, _ = value_and_jacobian(twice, x1, x2)
    assert plan(twice, x1, x2).backend != "reference"
    assert abs((y != 0).double().mean().item() - 0.25) < 0.07


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(1.0 * x)


def test_a_recomputation_under_checkpointing_draws_the_same_mask() -> None:
    torch.manual_seed(0)
    net, x1, x2 = Net(), torch.randn(60, 2), torch.randn(60, 1)

    def loss() -> Tensor:
        y, penalty = fused_mono_penalty(net, x1, x2, margin=0.2, return_output=True)
        return y.square().sum() + penalty

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        value = checkpoint(loss, use_reentrant=False) if recompute else loss()
        return (value, *torch.autograd.grad(value, list(net.parameters())))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)
