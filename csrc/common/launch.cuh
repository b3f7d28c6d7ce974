// The one way to start a kernel, so that the same source runs on a GPU and, built with KD_SIMT, thread by thread on the
// CPU.
#pragma once

#include <cuda_runtime.h>  // with KD_SIMT, the stand-in of the test harness
#include <torch/csrc/stable/accelerator.h>

#include <cstddef>
#include <limits>

#include "common/tensor.h"

// Shared memory is declared by macro. KD_SHARED(A, sums, 8) is an array of 8, the same one wherever the function is
// called from; KD_DYNAMIC_SHARED(A, x) points to the Grid's shared_bytes, aligned to 16.
#if defined(KD_SIMT)
#define KD_SHARED(type, name, count)              \
  static const simt::Shared name##_shared{#name}; \
  type(&name)[count] = *static_cast<type(*)[count]>(simt::shared(name##_shared, sizeof(type) * (count)))
#define KD_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(simt::dynamic_shared())
#else
#define KD_SHARED(type, name, count) __shared__ type name[count]
#define KD_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char kd_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(kd_dynamic_shared)
#endif

namespace kdfast {

// How many threads run a kernel, and the bytes that KD_DYNAMIC_SHARED finds in each block.
struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
};

// Scratch memory of n elements on the device of `like`.
template <class T>
class DeviceMemory {
 public:
  DeviceMemory(const Tensor& like, int64_t n)
      : memory_(empty(like, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float, {n})) {}
  T* data() { return static_cast<T*>(memory_.data_ptr()); }

 private:
  Tensor memory_;
};

inline int64_t blocks_for(int64_t work, int64_t per_block) { return (work + per_block - 1) / per_block; }

#if defined(KD_SIMT)

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

template <class... P, class... Q>
void launch(const OnDevice&, Grid grid, void (*kernel)(P...), Q... args) {
  simt::run(dim3(static_cast<unsigned>(grid.blocks)), dim3(grid.threads), grid.shared_bytes,
            reinterpret_cast<const void*>(kernel), [=] { kernel(static_cast<P>(args)...); });
}

#else

// Makes the tensor's device current for as long as it lives, and knows the stream to work on.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {
    void* current;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

template <class... P, class... Q>
void launch(const OnDevice& device, Grid grid, void (*kernel)(P...), Q... args) {
  STD_TORCH_CHECK(grid.blocks <= std::numeric_limits<int>::max(), "kdfast: too many rows for one launch: ", grid.blocks,
                  " blocks");
  const auto check = [](cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "kdfast: a kernel did not start: ", cudaGetErrorString(error),
                    " (`kdfast doctor` says for which GPUs it was built)");
  };
  if (grid.shared_bytes > (48 << 10)) {  // what every kernel may use unasked
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes, device.stream>>>(
      static_cast<P>(args)...);
  check(cudaGetLastError());
}

#endif

// Base of the backends in cuda.cu: on the device and the stream of a tensor.
struct DeviceBackend {
  template <class T>
  using Memory = DeviceMemory<T>;
  OnDevice device;

  explicit DeviceBackend(const Tensor& x) : device(x) {}
};

}  // namespace kdfast
