// The kernels for AVX2 with FMA; setup.py gives this file those flags.
#define MK_VECTOR_BYTES 32
#include "kernels.h"

const InstructionSet avx2_kernels = {"avx2", kernels_of<float>(), kernels_of<double>(),
                                     chain_slopes};
