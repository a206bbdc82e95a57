// The kernels that every processor of the architecture runs: SSE2 on x86-64, NEON on aarch64.
#define MK_VECTOR_BYTES 16
#include "kernels.h"

#if defined(__aarch64__)
const InstructionSet baseline_kernels = {"neon", kernels_of<float>(), kernels_of<double>(),
                                         chain_slopes};
#else
const InstructionSet baseline_kernels = {"baseline", kernels_of<float>(), kernels_of<double>(),
                                         chain_slopes};
#endif
