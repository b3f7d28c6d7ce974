// Stands in for the CUDA runtime, and for what csrc/*/cuda.cu needs of a torch with CUDA: the objects that nvcc made of
// them are linked against this file, so that the host code of the wheel launches, and packs the parameters for, the
// machine code of the wheel. Its ops are registered for tensors on the CPU, as kdfast_sass::<op>.
//
// A fault is the error of the launch, whose text cudaGetErrorString gives.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdio>
#include <sstream>
#include <unordered_map>

#include "machine.h"

namespace {

using namespace sass;

constexpr int kParameters = 0x210;     // their place in the constant bank
constexpr size_t kUnasked = 48 << 10;  // bytes of shared memory that a launch may use without cudaFuncSetAttribute,
constexpr size_t kMost = 227 << 10;    // and with it
constexpr int kLaunchFailure = 719;    // cudaErrorLaunchFailure

struct Entry {
  std::string cubin;
  Kernel kernel;
};

struct Dim3 {
  unsigned x, y, z;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

std::string cuobjdump;
std::unordered_map<std::string, Entry> entries;       // by mangled name
std::unordered_map<const void*, size_t> most_shared;  // what cudaFuncSetAttribute allowed
std::map<std::string, Counts> counts;                 // since sass_begin
int64_t allocations = 0;
Configuration configuration;
int last_error = 0;
std::string message, answer;

// Host function -> mangled name. Built when the first object registers its own, as the library is loaded.
std::unordered_map<const void*, std::string>& functions() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}

std::string disassemble(const std::string& name, const std::string& cubin) {
  const std::string command = cuobjdump + " -sass -fun " + name + " '" + cubin + "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  std::string text;
  char part[1 << 14];
  while (pipe) {
    const size_t read = fread(part, 1, sizeof(part), pipe);
    if (read == 0) break;
    text.append(part, read);
  }
  if (!pipe || pclose(pipe) != 0) throw Fault("cuobjdump failed: " + text);
  return text;
}

const Kernel& kernel_of(const void* function) {
  const auto name = functions().find(function);
  if (name == functions().end()) throw Fault("a launch of what is no kernel");
  const auto entry = entries.find(name->second);
  if (entry == entries.end()) throw Fault("no machine code of " + name->second);
  Kernel& kernel = entry->second.kernel;
  kernel.name = name->second;
  if (kernel.code.empty()) kernel.code = decode(disassemble(kernel.name, entry->second.cubin));
  return kernel;
}

void launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
  const Kernel& kernel = kernel_of(function);
  Launch it{&kernel, grid.x, block.x, static_cast<uint32_t>(shared), {}};
  const auto most = most_shared.find(function);
  const size_t all = shared_end(it) - kSharedBegin, asked = most == most_shared.end() ? 0 : most->second;
  const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!flat || grid.x == 0 || block.x == 0 || block.x > 1024 || (all > kUnasked && shared > asked) || all > kMost) {
    throw Fault("a launch that CUDA refuses, or the emulator: " + std::to_string(grid.x) + " blocks of " +
                std::to_string(block.x) + " threads with " + std::to_string(all) + " bytes of shared memory");
  }
  size_t end = kParameters;
  for (const auto& [offset, size] : kernel.parameters) end = std::max<size_t>(end, kParameters + offset + size);
  it.constants.assign((end + 15) / 16 * 16, 0);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const auto [offset, size] = kernel.parameters[i];
    memcpy(it.constants.data() + kParameters + offset, arguments[i], size);
  }
  run(std::move(it), counts[kernel.name]);
}

int try_launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
  try {
    launch(function, grid, block, arguments, shared);
  } catch (const Fault& fault) {
    const auto name = functions().find(function);
    message = std::string("sass: ") + fault.what() + (name == functions().end() ? "" : "\n  of " + name->second);
    last_error = kLaunchFailure;
  }
  return last_error;
}

// All memory of the tensor's storage may be touched.
void allow_storage(AtenTensorHandle tensor, void* data) {
  int64_t bytes, offset;
  int32_t dtype;
  aoti_torch_get_storage_size(tensor, &bytes);
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_dtype(tensor, &dtype);
  if (bytes > 0) allow(static_cast<char*>(data) - offset * aoti_torch_dtype_element_size(dtype), bytes);
}

// As JSON. Lists are [requests, sectors, different sectors], [all trips, those of the warp with most], and [accesses,
// conflicts]; "in_flight" is the mean of all trips.
std::string described(const Counts& c) {
  std::ostringstream to;
  to << "{\"launches\": " << c.launches << ", \"warps\": " << c.warps << ", \"barriers\": " << c.barriers;
  for (int i = 0; i < kClasses; ++i) to << ", \"" << kClassNames[i] << "\": " << c.instructions[i];
  const auto list = [&](const char* name, std::initializer_list<int64_t> values) {
    const char* separator = "\": [";
    to << ", \"" << name;
    for (int64_t value : values) to << separator << value, separator = ", ";
    to << "]";
  };
  list("loads", {c.loads.requests, c.loads.sectors, c.loads.distinct});
  list("stores", {c.stores.requests, c.stores.sectors, c.stores.distinct});
  list("banks", {c.shared_requests, c.conflicts});
  list("trips", {c.trips, c.most_trips});
  to << ", \"in_flight\": " << (c.trips ? c.in_flight / c.trips : 0);
  to << ", \"far\": " << c.far << ", \"pauses\": " << c.pauses << ", \"clocks\": " << c.clocks << "}";
  return to.str();
}

}  // namespace

extern "C" {

// ---- for Python
#define SASS_API __attribute__((visibility("default")))

SASS_API void sass_disassembler(const char* program) { cuobjdump = program; }

// A kernel of a cubin; `parameters` has the offset and size of each of `count`.
SASS_API void sass_kernel(const char* name, const char* cubin, uint32_t shared_end, const int* parameters, int count) {
  Entry& entry = entries[name];
  entry = {cubin, {}};
  entry.kernel.shared_end = shared_end;
  for (int i = 0; i < count; ++i) entry.kernel.parameters.push_back({parameters[2 * i], parameters[2 * i + 1]});
}

// From now on at most so many blocks of a launch run; 0: all.
SASS_API void sass_sample(uint32_t blocks) { most_blocks = blocks; }

// Before a call of an op: nothing is counted, and no memory may be touched.
SASS_API void sass_begin() {
  counts.clear();
  allocations = 0;
  forget_all();
}

// What has been counted since, as JSON.
SASS_API const char* sass_counts() {
  std::ostringstream to;
  to << "{\"allocations\": " << allocations << ", \"kernels\": {";
  const char* separator = "";
  for (const auto& [name, c] : counts) {
    to << separator << "\"" << name << "\": " << described(c);
    separator = ", ";
  }
  to << "}}";
  answer = to.str();
  return answer.c_str();
}

// ---- the CUDA runtime
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  functions()[function] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}

int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return try_launch(kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return try_launch(kernel, grid, block, arguments, shared);
}
int cudaFuncSetAttribute(const void* kernel, int, int value) {
  most_shared[kernel] = value;
  return 0;
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int) { return message.c_str(); }

// ---- torch; the linker puts __wrap_f in place of f
AOTITorchError __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                   TorchLibraryHandle*);
AOTITorchError __real_aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                               AtenTensorHandle*);

AOTITorchError __wrap_aoti_torch_library_init_impl(const char* space, const char*, const char* file, uint32_t line,
                                                   TorchLibraryHandle* library) {
  const char* own = strcmp(space, "kdfast") == 0 ? "kdfast_sass" : space;
  return __real_aoti_torch_library_init_impl(own, "CPU", file, line, library);
}

AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_aoti_torch_get_data_ptr(tensor, data);
  if (error == AOTI_TORCH_SUCCESS) allow_storage(tensor, *data);
  return error;
}

AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t device, int32_t index, AtenTensorHandle* tensor) {
  const AOTITorchError error = __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, tensor);
  void* data;
  int64_t bytes;
  if (error != AOTI_TORCH_SUCCESS || __real_aoti_torch_get_data_ptr(*tensor, &data) != AOTI_TORCH_SUCCESS) return error;
  aoti_torch_get_storage_size(*tensor, &bytes);
  if (bytes > 0) {
    ++allocations;
    // NaN in every dtype: an element that no kernel writes shows. Where only some blocks write, it is to be a number.
    memset(data, most_blocks ? 0 : 0xff, bytes);
  }
  return error;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
