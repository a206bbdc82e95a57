// The elementwise kinds: row(name, its struct in activations.h, whether σ'' is zero everywhere).
//
// The order is that of the activation table (monokernel/activations.py), whose codes the library
// switches on: append, never reorder.
#pragma once

#define MK_KINDS(row)                 \
  row(identity, Identity, true)       \
  row(relu, Relu, true)               \
  row(leaky_relu, LeakyRelu, true)    \
  row(hardtanh, Hardtanh, true)       \
  row(elu, Elu, false)                \
  row(gelu, Gelu, false)              \
  row(gelu_tanh, GeluTanh, false)     \
  row(silu, Silu, false)              \
  row(mish, Mish, false)              \
  row(softplus, Softplus, false)      \
  row(softsign, Softsign, false)      \
  row(tanh, TanhKind, false)          \
  row(sigmoid, Sigmoid, false)        \
  row(logsigmoid, LogSigmoid, false)  \
  row(hardsigmoid, Hardsigmoid, true) \
  row(hardswish, Hardswish, false)    \
  row(softshrink, Softshrink, true)   \
  row(hardshrink, Hardshrink, true)   \
  row(threshold, Threshold, true)     \
  row(clamp, Clamp, true)             \
  row(tanhshrink, Tanhshrink, false)  \
  row(abs, Abs, true)                 \
  row(square, Square, false)          \
  row(sqrt, Sqrt, false)              \
  row(exp, Exponential, false)        \
  row(log, Log, false)                \
  row(reciprocal, Reciprocal, false)  \
  row(sin, Sine, false)               \
  row(cos, Cosine, false)             \
  row(erf, Erf, false)
