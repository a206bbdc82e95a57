"""Prints ``polynomials.h``, the fits behind ``vmath.h``: python fit_polynomials.py > polynomials.h

Chebyshev interpolation in 60 digits, turned to powers. The relative error of each fit stands beside
its table; rounding adds the rest, which tests/test_cpu.py measures.
"""

from mpmath import atanh, chebyfit, erf, erfc, exp, expm1, linspace, log, mp, mpf, pi, polyval, sqrt

mp.dps = 60
TINY = mpf(10) ** -20


def exp_tail(r):
    """(exp(r) - 1 - r) / r², on |r| ≤ log(2)/2."""
    return mpf(1) / 2 + r / 6 if abs(r) < TINY else (expm1(r) - r) / r**2


def atanh_tail(w):
    """(atanh(s)/s - 1) / s² of w = s², on s ≤ 1/3: log1p(e) = 2·atanh(e / (2 + e))."""
    return mpf(1) / 3 if w < TINY else (atanh(sqrt(w)) / sqrt(w) - 1) / w


def normal_tail(c):
    """Φ(-x)·exp(x²/2) of t = (x - c)/(x + c), x ≥ 0."""

    def f(t):
        z = c * (1 + t) / (1 - t) / sqrt(2)
        return exp(z * z) * erfc(z) / 2

    return f


def erf_near(w):
    """erf(a)/a of w = a², on |a| ≤ 1."""
    return 2 / sqrt(pi) if w < TINY else erf(sqrt(w)) / sqrt(w)


def table(name, f, low, high, n, dtype):
    p, _ = chebyfit(f, [low, high], n, error=True)
    worst = max(abs(polyval(p, x) / f(x) - 1) for x in linspace(low, high, 501))
    suffix = "f" if dtype == "float" else ""
    numbers = ", ".join(f"{mp.nstr(c, 20)}{suffix}" for c in p)
    print(f"// relative error {mp.nstr(worst, 2)}")
    print(f"template <> struct {name}<{dtype}> {{")
    print(f"  static constexpr {dtype} c[] = {{{numbers}}};\n}};")


def main():
    print("// Made by fit_polynomials.py: coefficients of vmath.h, highest power first.")
    print("#pragma once\n")
    print("namespace {\n")
    half = log(2) / 2 * mpf("1.01")
    ninth = mpf(1) / 9 * mpf("1.0001")
    c32, c64 = mpf(3), mpf(4)
    for name, fits in {
        "ExpTail": [(exp_tail, -half, half, 5), (exp_tail, -half, half, 11)],
        "AtanhTail": [(atanh_tail, mpf(0), ninth, 5), (atanh_tail, mpf(0), ninth, 12)],
        "NormalTail": [
            (normal_tail(c32), mpf(-1), (mpf("13.3") - c32) / (mpf("13.3") + c32), 10),
            (normal_tail(c64), mpf(-1), (39 - c64) / (39 + c64), 26),
        ],
        "ErfNear": [(erf_near, mpf(0), mpf(1), 7), (erf_near, mpf(0), mpf(1), 13)],
    }.items():
        print(f"template <class T> struct {name};")
        for dtype, fit in zip(("float", "double"), fits, strict=True):
            table(name, *fit, dtype)
        print()
    print("}  // namespace")


if __name__ == "__main__":
    main()
