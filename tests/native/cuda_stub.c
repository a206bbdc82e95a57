// A CUDA driver without a device: the symbols that Triton's launcher links against, as libcuda.so.1.
//
// Nothing is loaded, copied or run. What a driver would refuse is refused all the same: an image that
// is no machine code for the card, a grid, a block or shared memory beyond the card's limits, an
// unknown attribute. The card is what `stub_card` was told; `stub_launches` counts.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <string.h>

enum { machine_cuda = 190, largest_grid_y = 65535, largest_block = 1024 };

static struct {
  int capability, shared, processors;
} card;
static long launches;
static int context, function;  // their addresses are handles

void stub_card(int capability, int shared, int processors) {
  card.capability = capability;
  card.shared = shared;
  card.processors = processors;
}

long stub_launches(void) { return launches; }

// --- device and context ---------------------------------------------------------------------------

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (device) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = card.capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = card.capability % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = card.processors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = card.shared; break;
    // Triton reads the clocks for its own reports of a roofline.
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice device) {
  *found = (CUcontext)&context;
  return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* found) {
  *found = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext given) {
  return given == (CUcontext)&context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (error) {
    case CUDA_SUCCESS: *text = "no error"; break;
    case CUDA_ERROR_INVALID_IMAGE: *text = "the stub was given no machine code"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "the stub refuses a value"; break;
    default: *text = "the stub refuses";
  }
  return CUDA_SUCCESS;
}

// --- kernels --------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const Elf64_Ehdr* head = image;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_machine != machine_cuda)
    return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  return module ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuModuleGetFunction(CUfunction* found, CUmodule module, const char* name) {
  *found = (CUfunction)&function;
  return module && *name ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction given) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? largest_block : 0;
  return given == (CUfunction)&function ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuFuncSetAttribute(CUfunction given, CUfunction_attribute attribute, int value) {
  if (given != (CUfunction)&function) return CUDA_ERROR_INVALID_HANDLE;
  int size = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return size && value > card.shared ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction given, CUfunc_cache config) {
  (void)config;
  return given == (CUfunction)&function ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction given, void** params, void** extra) {
  if (given != (CUfunction)&function) return CUDA_ERROR_INVALID_HANDLE;
  uint64_t threads = (uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  int grid = c->gridDimX && c->gridDimX <= INT32_MAX && c->gridDimY && c->gridDimZ &&
             c->gridDimY <= largest_grid_y && c->gridDimZ <= largest_grid_y;
  int block = threads && threads <= largest_block && c->sharedMemBytes <= (unsigned)card.shared;
  if (!grid || !block || !params || extra) return CUDA_ERROR_INVALID_VALUE;
  ++launches;
  return CUDA_SUCCESS;
}

// The tensors lie where PyTorch put them: a pointer is its own address on the device.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
