// Kernels with a fault planted in each, for tests/test_simt.py: kFault says whether it is there. All of them turn
// x [n] into y [n]; a kernel without its fault computes 2 x.
#include <map>
#include <string>

#include "common/group.cuh"

namespace kdfast {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// ---- memory
template <bool kFault>
__global__ void reads_global_out_of_bounds(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i < n) y[i] = x[i] + x[kFault ? i + 1 : i];
}

template <bool kFault>
__global__ void writes_global_out_of_bounds(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i < n) y[kFault ? i + 1 : i] = 2 * x[i];
}

template <bool kFault>
__global__ void reads_shared_out_of_bounds(const float* x, float* y, int n) {
  KD_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = x[i];
  __syncthreads();
  y[i] = tile[i] + *(tile + (kFault ? i + 1 : i));
}

template <bool kFault>
__global__ void writes_dynamic_shared_out_of_bounds(const float* x, float* y, int n) {
  KD_DYNAMIC_SHARED(float, tile);
  const int i = threadIdx.x;
  tile[kFault ? 2 * i : i] = x[i];
  __syncthreads();
  y[i] = 2 * tile[kFault ? 2 * i : i];
}

template <bool kFault>
__global__ void misaligned_vector(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i >= n / 2) return;
  const float2 pair = *reinterpret_cast<const float2*>(x + (kFault && i == 0 ? 1 : 2 * i));
  y[2 * i] = 2 * pair.x;
  y[2 * i + 1] = 2 * pair.y;
}

template <bool kFault>
__global__ void uninitialised_shared(const float* x, float* y, int n) {
  KD_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  if (!kFault || i > 0) tile[i] = x[i];
  __syncthreads();
  y[i] = 2 * tile[i];
}

template <bool kFault>
__global__ void unwritten_output(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i < (kFault ? n - 1 : n)) y[i] = 2 * x[i];
}

// ---- races
template <bool kFault>
__global__ void missing_barrier(const float* x, float* y, int n) {
  KD_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = x[i];
  if (!kFault) __syncthreads();
  y[n - 1 - i] = 2 * tile[n - 1 - i];
}

// The second round overwrites what slower threads still read in the first.
template <bool kFault>
__global__ void missing_barrier_before_reuse(const float* x, float* y, int n) {
  KD_SHARED(float, tile, kThreads);
  const int i = threadIdx.x, other = n - 1 - i;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[i] = x[i] * (round + 1);
    __syncthreads();
    sum += tile[other];
    if (!kFault) __syncthreads();
  }
  y[other] = sum * 2 / 3;
}

struct Triple {
  float x, twice, thrice;
};

__device__ Triple triple(const float* x, int i, int n) {  // not so short that every compiler inlines it
  if (i < 0 || i >= n) return {0, 0, 0};
  return {x[i], x[i] + x[i], x[i] + x[i] + x[i]};
}

// Stores of whole structs, which functions return.
template <bool kFault>
__global__ void missing_barrier_around_structs(const float* x, float* y, int n) {
  KD_SHARED(Triple, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = triple(x, i - 1, n);
  __syncthreads();
  if (!kFault) tile[i] = triple(x, i, n);
  __syncthreads();
  if (kFault) tile[i] = triple(x, i, n);
  y[n - 1 - i] = tile[n - 1 - i].twice;
}

template <bool kFault>
__global__ void missing_syncwarp(const float* x, float* y, int n) {
  KD_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = x[i];
  if (!kFault) __syncwarp();
  y[i ^ 1] = 2 * tile[i ^ 1];
}

template <bool kFault>
__global__ void missing_atomic(const float* x, float* y, int n) {
  KD_SHARED(int, count, 1);
  const int i = threadIdx.x;
  if (i == 0) count[0] = 0;
  __syncthreads();
  if (kFault) {
    count[0] = count[0] + 1;
  } else {
    atomicAdd(count, 1);
  }
  __syncthreads();
  y[i] = count[0] == n ? 2 * x[i] : 0;
}

// Every block writes the same elements.
template <bool kFault>
__global__ void blocks_overlap(const float* x, float* y, int n) {
  const int each = n / gridDim.x, first = kFault ? 0 : blockIdx.x * each;
  for (int i = first + threadIdx.x; i < (kFault ? n : first + each); i += blockDim.x) y[i] = 2 * x[i];
}

// ---- barriers and collectives
template <bool kFault>
__global__ void different_barriers(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (kFault && i < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[i] = 2 * x[i];
}

template <bool kFault>
__global__ void mask_names_absent_lanes(const float* x, float* y, int n) {  // in a block of 40 threads
  const int i = threadIdx.x;
  y[i] = __shfl_xor_sync(i < kWarp || kFault ? kAll : 0xffu, 2 * x[i], 0);
}

template <bool kFault>
__global__ void mask_leaves_caller_out(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  y[i] = __shfl_xor_sync(kFault ? kAll << 1 : kAll, 2 * x[i], 0);
}

template <bool kFault>
__global__ void masks_differ(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  y[i] = __shfl_xor_sync(kFault && i == 3 ? 0xffu : kAll, 2 * x[i], 0);
}

template <bool kFault>
__global__ void collectives_differ(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (kFault && i % 2) {
    __ballot_sync(kAll, 1);
  } else {
    __any_sync(kAll, 1);
  }
  y[i] = 2 * x[i];
}

template <bool kFault>
__global__ void named_lane_does_something_else(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (!kFault || i % kWarp) __syncwarp();
  __syncthreads();
  y[i] = 2 * x[i];
}

// Lanes that have exited need not arrive, but have no value to read.
template <bool kFault>
__global__ void reads_exited_lane(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  y[i] = 2 * x[i];
  if (i % 2) return;
  __syncthreads();
  y[i] = __shfl_sync(kAll, 2 * x[i], kFault ? i + 1 : i);
}

using Kernel = void (*)(const float*, float*, int);

struct Case {
  Grid grid;
  Kernel right, wrong;
};

#define CASE(name, ...)                                    \
  {                                                        \
    #name, Case { {__VA_ARGS__}, name<false>, name<true> } \
  }
const std::map<std::string, Case> kCases = {
    CASE(reads_global_out_of_bounds, 1, kThreads),
    CASE(writes_global_out_of_bounds, 1, kThreads),
    CASE(reads_shared_out_of_bounds, 1, kThreads),
    CASE(writes_dynamic_shared_out_of_bounds, 1, kThreads, kThreads * sizeof(float)),
    CASE(misaligned_vector, 1, kThreads),
    CASE(uninitialised_shared, 1, kThreads),
    CASE(unwritten_output, 1, kThreads),
    CASE(missing_barrier, 1, kThreads),
    CASE(missing_barrier_before_reuse, 1, kThreads),
    CASE(missing_barrier_around_structs, 1, kThreads),
    CASE(missing_syncwarp, 1, kThreads),
    CASE(missing_atomic, 1, kThreads),
    CASE(blocks_overlap, 2, kThreads),
    CASE(different_barriers, 1, kThreads),
    CASE(mask_names_absent_lanes, 1, 40),
    CASE(mask_leaves_caller_out, 1, kThreads),
    CASE(masks_differ, 1, kThreads),
    CASE(collectives_differ, 1, kThreads),
    CASE(named_lane_does_something_else, 1, kThreads),
    CASE(reads_exited_lane, 1, kThreads),
};

std::string names() {
  std::string all;
  for (const auto& c : kCases) all += c.first + " ";
  return all;
}

int64_t threads(std::string name) { return kCases.at(name).grid.threads; }

Tensor run(std::string name, bool fault, Tensor x) {
  const Case& c = kCases.at(name);
  Tensor y = empty(x, ScalarType::Float, {x.size(0)});
  launch(OnDevice(x), c.grid, fault ? c.wrong : c.right, static_cast<const float*>(x.data_ptr()),
         static_cast<float*>(y.data_ptr()), static_cast<int>(x.size(0)));
  return y;
}

}  // namespace
}  // namespace kdfast

STABLE_TORCH_LIBRARY(kdfast_faults, m) {
  m.def("names() -> str");
  m.def("threads(str name) -> int");
  m.def("run(str name, bool fault, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast_faults, CompositeExplicitAutograd, m) {
  m.impl("names", TORCH_BOX(&kdfast::names));
  m.impl("threads", TORCH_BOX(&kdfast::threads));
  m.impl("run", TORCH_BOX(&kdfast::run));
}
