// Kernels for tests/test_sass.py, each of one warp: with a fault where k is 1, or with accesses whose counts are known.
#include <map>
#include <string>

#include "common/group.cuh"
#include "common/host.h"

namespace kdfast {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// Of all that was loaded, so that all of it is.
__device__ float total(float x) { return x; }
__device__ float total(float2 x) { return x.x + x.y; }
__device__ float total(float4 x) { return x.x + x.y + x.z + x.w; }

// ---- faults, of which there is none where k is 0
__global__ void misaligned(const float* x, float* y, int k) {
  y[threadIdx.x] = total(reinterpret_cast<const float4*>(x + k)[threadIdx.x]);
}

__global__ void reads_global_out_of_bounds(const float* x, float* y, int k) {
  y[threadIdx.x] = x[threadIdx.x + 1024 * k];
}

__global__ void writes_global_out_of_bounds(const float* x, float* y, int k) { y[threadIdx.x - k] = x[threadIdx.x]; }

__global__ void reads_shared_out_of_bounds(const float* x, float* y, int k) {
  KD_SHARED(float, tile, kWarp);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[(threadIdx.x ^ 1) + k];
}

__global__ void writes_shared_out_of_bounds(const float* x, float* y, int k) {
  KD_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + k] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void too_much_shared(const float* x, float* y, int k) {
  KD_SHARED(float, tile, kWarp);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void divergent_barrier(const float* x, float* y, int k) {
  if (threadIdx.x >= 16 * k) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void absent_lanes(const float* x, float* y, int k) {
  if (threadIdx.x >= 16 * k) y[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 16);
}

__global__ void unknown_opcode(const float* x, float* y, int k) { y[threadIdx.x] = __popc(__float_as_int(x[k])); }

__global__ void unknown_form(const float* x, float* y, int k) { y[threadIdx.x] = __sinf(x[threadIdx.x] + k); }

// ---- counts, which depend on k
__global__ void strided_load(const float* x, float* y, int k) { y[threadIdx.x] = x[threadIdx.x * k]; }

__global__ void offset_load(const float* x, float* y, int k) { y[threadIdx.x] = x[threadIdx.x + k]; }

__global__ void one_store(const float* x, float* y, int k) {
  reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
}

__global__ void split_store(const float* x, float* y, int k) {
  const float4 pack = reinterpret_cast<const float4*>(x)[threadIdx.x];
  float* to = y + 4 * threadIdx.x;
  to[0] = pack.x, to[1] = pack.y, to[2] = pack.z, to[3] = pack.w;
}

// Each load needs the one before it: 1 + k waits.
__global__ void chained_loads(const float* x, float* y, int k) {
  const int* next = reinterpret_cast<const int*>(x);
  int at = threadIdx.x;
#pragma unroll 1
  for (int i = 0; i <= k; ++i) at = next[at];
  reinterpret_cast<int*>(y)[threadIdx.x] = at;
}

// Four at once: one wait, 16 bytes in flight.
__global__ void loads_at_once(const float* x, float* y, int k) {
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = x[threadIdx.x + (k + i) * kWarp];
  y[threadIdx.x] = sum[0] + sum[1] + sum[2] + sum[3];
}

// One store and one load, of lanes that are k elements apart.
template <class T>
__global__ void shared_access(const float* x, float* y, int k) {
  KD_SHARED(T, tile, kWarp * 128 / sizeof(T));
  tile[threadIdx.x * k] = reinterpret_cast<const T*>(x)[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = total(tile[(threadIdx.x ^ 1) * k]);
}

using Kernel = void (*)(const float*, float*, int);

const std::map<std::string, Kernel> kKernels = {
    {"misaligned", misaligned},
    {"reads_global_out_of_bounds", reads_global_out_of_bounds},
    {"writes_global_out_of_bounds", writes_global_out_of_bounds},
    {"reads_shared_out_of_bounds", reads_shared_out_of_bounds},
    {"writes_shared_out_of_bounds", writes_shared_out_of_bounds},
    {"too_much_shared", too_much_shared},
    {"divergent_barrier", divergent_barrier},
    {"absent_lanes", absent_lanes},
    {"unknown_opcode", unknown_opcode},
    {"unknown_form", unknown_form},
    {"strided_load", strided_load},
    {"offset_load", offset_load},
    {"one_store", one_store},
    {"split_store", split_store},
    {"chained_loads", chained_loads},
    {"loads_at_once", loads_at_once},
    {"shared_float", shared_access<float>},
    {"shared_float2", shared_access<float2>},
    {"shared_float4", shared_access<float4>},
};

Tensor run(Tensor x, std::string name, int64_t k) {
  Tensor y = empty(x, ScalarType::Float, {x.size(0)});
  const size_t dynamic = name == "writes_shared_out_of_bounds" ? kWarp * sizeof(float)
                         : name == "too_much_shared"           ? k
                                                               : 0;
  launch(OnDevice(x), {1, kWarp, dynamic}, kKernels.at(name), data<const float>(x), data<float>(y),
         static_cast<int>(k));
  return y;
}

}  // namespace
}  // namespace kdfast

STABLE_TORCH_LIBRARY(kdfast_sass_faults, m) { m.def("run(Tensor x, str name, int k) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(kdfast_sass_faults, CUDA, m) { m.impl("run", TORCH_BOX(&kdfast::run)); }
