// The kernels for AVX-512 (F, VL, DQ, BW); setup.py gives this file those flags.
#define MK_VECTOR_BYTES 64
#include "kernels.h"

const InstructionSet avx512_kernels = {"avx512", kernels_of<float>(), kernels_of<double>(),
                                       chain_slopes};
