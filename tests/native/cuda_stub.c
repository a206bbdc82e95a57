// A CUDA driver without a device: the symbols that Triton's launcher links against, as libcuda.so.1.
//
// Nothing is loaded, copied or run. What a driver would refuse is refused all the same: an image that
// is no machine code for the card, a grid, a block or shared memory beyond the card's limits, an
// unknown attribute. The card is what `stub_card` was told; `stub_launches` counts, and `stub_log` has what
// each launch was given.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <string.h>

enum { machine_cuda = 190, largest_grid_y = 65535, largest_block = 1024 };
enum { most_kernels = 4096, most_parameters = 256, log_size = 1 << 16 };

static struct {
  int capability, shared, processors;
} card;
static long launches;
static int context;  // its address is a handle, as is a kernel's

// The bytes of each parameter.
static struct kernel {
  int count;
  unsigned char size[most_parameters];
} kernels[most_kernels];
static int known;

static uint64_t logged[log_size];
static long log_end;

void stub_card(int capability, int shared, int processors) {
  card.capability = capability;
  card.shared = shared;
  card.processors = processors;
}

long stub_launches(void) { return launches; }

// Since stub_forget, of each launch: which kernel, the grid, the block, shared memory, the stream, how many
// parameters, and their bytes, each in a number of its own.
const uint64_t* stub_log(long* size) {
  *size = log_end;
  return logged;
}

void stub_forget(void) { log_end = 0; }

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

// What the machine code says of a kernel's parameters: in .nv.info.NAME, attributes of 4 bytes (format,
// number, and 2 of value or of the size of what follows); 0x17 is a parameter's.
static void read_parameters(struct kernel* k, const char* image, const char* name) {
  const Elf64_Ehdr* head = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + head->e_shoff);
  const char prefix[] = ".nv.info.";
  for (int i = 0; i < head->e_shnum; ++i) {
    const char* own = image + sections[head->e_shstrndx].sh_offset + sections[i].sh_name;
    if (strncmp(own, prefix, sizeof prefix - 1) || strcmp(own + sizeof prefix - 1, name)) continue;
    const unsigned char* at = (const unsigned char*)image + sections[i].sh_offset;
    const unsigned char* end = at + sections[i].sh_size;
    while (at < end) {
      const int sized = at[0] == 4, attribute = at[1];
      const unsigned size = sized ? at[2] | at[3] << 8 : 0;
      if (sized && attribute == 0x17) {
        const int ordinal = at[8] | at[9] << 8;
        const uint32_t packed = at[12] | at[13] << 8 | at[14] << 16 | (uint32_t)at[15] << 24;
        if (ordinal < most_parameters) {
          k->size[ordinal] = packed >> 18;
          if (ordinal >= k->count) k->count = ordinal + 1;
        }
      }
      at += 4 + size;
    }
  }
}

CUresult cuModuleGetFunction(CUfunction* found, CUmodule module, const char* name) {
  if (!module || !*name || known == most_kernels) return CUDA_ERROR_NOT_FOUND;
  struct kernel* k = &kernels[known++];
  read_parameters(k, (const char*)module, name);
  *found = (CUfunction)k;
  return CUDA_SUCCESS;
}

static int is_kernel(CUfunction given) {
  const struct kernel* k = (const struct kernel*)given;
  return k >= kernels && k < kernels + known;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction given) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? largest_block : 0;
  return is_kernel(given) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuFuncSetAttribute(CUfunction given, CUfunction_attribute attribute, int value) {
  if (!is_kernel(given)) return CUDA_ERROR_INVALID_HANDLE;
  int size = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return size && value > card.shared ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction given, CUfunc_cache config) {
  (void)config;
  return is_kernel(given) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuLaunchKernel(CUfunction given, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream, void** params,
                        void** extra) {
  if (!is_kernel(given)) return CUDA_ERROR_INVALID_HANDLE;
  uint64_t threads = (uint64_t)bx * by * bz;
  int grid = gx && gx <= INT32_MAX && gy && gz && gy <= largest_grid_y && gz <= largest_grid_y;
  int block = threads && threads <= largest_block && shared <= (unsigned)card.shared;
  if (!grid || !block || !params || extra) return CUDA_ERROR_INVALID_VALUE;
  ++launches;
  const struct kernel* k = (const struct kernel*)given;
  if (log_end + 8 + k->count > log_size) return CUDA_SUCCESS;
  const uint64_t place[] = {k - kernels, gx, gy, gz, bx, shared, (uint64_t)stream, k->count};
  memcpy(logged + log_end, place, sizeof place);
  log_end += 8;
  for (int i = 0; i < k->count; ++i, ++log_end) {
    logged[log_end] = 0;
    memcpy(logged + log_end, params[i], k->size[i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction given, void** params, void** extra) {
  return cuLaunchKernel(given, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                        c->blockDimZ, c->sharedMemBytes, c->hStream, params, extra);
}

// The tensors lie where PyTorch put them: a pointer is its own address on the device.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
