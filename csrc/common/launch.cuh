// The one way to start a kernel, so that the same source runs on a GPU and, built with KD_SIMT, thread by thread on the
// CPU.
#pragma once

#include <cuda_runtime.h>  // with KD_SIMT, the stand-in of the test harness
#include <torch/csrc/stable/accelerator.h>

#include <limits>

#include "common/tensor.h"

namespace kdfast {

#if defined(KD_SIMT)

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

template <class... P, class... Q>
void launch(const OnDevice&, void (*kernel)(P...), int64_t blocks, int threads, Q... args) {
  simt::run(dim3(static_cast<unsigned>(blocks)), dim3(threads), [=] { kernel(static_cast<P>(args)...); });
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
void launch(const OnDevice& device, void (*kernel)(P...), int64_t blocks, int threads, Q... args) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "kdfast: too many rows for one launch: ", blocks,
                  " blocks");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, device.stream>>>(static_cast<P>(args)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "kdfast: a kernel did not start: ", cudaGetErrorString(error));
}

#endif

}  // namespace kdfast
