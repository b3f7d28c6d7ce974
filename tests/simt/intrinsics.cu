// What the device functions of cuda_runtime.h compute, for tests/test_simt.py: one row of the output for each.
#include "common/launch.cuh"

namespace kdfast {
namespace {

static_assert(sizeof(float2) == 8 && alignof(float2) == 8 && sizeof(float3) == 12 && alignof(float4) == 16, "");
static_assert(sizeof(double4) == 32 && alignof(double4) == 16 && alignof(int4) == 16 && alignof(uchar4) == 4, "");

constexpr unsigned kAll = 0xffffffffu;
constexpr int kRows = 30;

// x [lanes], y [kRows, lanes], in two blocks of which the second adds nothing but its atomics.
__global__ void intrinsics_kernel(const int* x, double* y, unsigned* counters) {
  const unsigned lane = threadIdx.x;
  atomicAdd(&counters[0], 1u + threadIdx.y + threadIdx.z + blockIdx.y + blockIdx.z);
  atomicSub(&counters[1], 1u);
  atomicMax(&counters[2], lane);
  atomicMin(&counters[3], lane + 7);
  atomicInc(&counters[4], 5u);
  atomicOr(&counters[5], 1u << lane);
  atomicAnd(&counters[6], ~(1u << lane));
  atomicXor(&counters[7], 3u << lane);
  atomicCAS(&counters[8], 0u, 100 + blockDim.x);
  atomicExch(&counters[9], gridDim.x);
  if (blockIdx.x > 0) return;
  const int mine = __ldg(x + lane);
  int row = 0;
  const auto put = [&](double value) { __stcs(&y[row++ * int(blockDim.x) + lane], value); };
  put(__shfl_sync(kAll, mine, 5));
  put(__shfl_sync(kAll, mine, 9, 8));
  put(__shfl_sync(kAll, mine, lane + 1));
  put(__shfl_up_sync(kAll, mine, 3));
  put(__shfl_up_sync(kAll, mine, 3, 8));
  put(__shfl_down_sync(kAll, mine, 3));
  put(__shfl_down_sync(kAll, double(mine), 3, 8));
  put(__shfl_xor_sync(kAll, mine, 16));
  put(__shfl_xor_sync(kAll, mine, 8, 8));
  put(__ballot_sync(kAll, mine > 0));
  put(__any_sync(kAll, mine > 1000) + 2 * __any_sync(kAll, mine > 0));
  put(__all_sync(kAll, mine > 0) + 2 * __all_sync(kAll, mine < 1000));
  put(__reduce_add_sync(kAll, mine));
  put(__reduce_min_sync(kAll, mine));
  put(__reduce_max_sync(kAll, mine));
  put(__reduce_and_sync(kAll, unsigned(mine)));
  put(__reduce_or_sync(kAll, unsigned(mine)));
  put(__reduce_xor_sync(kAll, unsigned(mine)));
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;  // each half of the warp on its own
  put(__reduce_add_sync(half, mine));
  put(__popc(mine));
  put(__ffs(mine));
  put(__clz(mine));
  put(__fdividef(1.0f, 4.0f) + __frcp_rn(2.0f) + __fsqrt_rn(9.0f) + rsqrtf(4.0f) + rsqrt(16.0));
  put(__expf(0.0f) + __logf(1.0f) + __log2f(8.0f) + __powf(2.0f, 5.0f) + __sinf(0.0f) + __cosf(0.0f));
  put(__fmaf_rn(2.0f, 3.0f, 4.0f) + __saturatef(-1.0f) + __saturatef(0.25f) + __saturatef(7.0f));
  put(__int_as_float(__float_as_int(1.5f)) + __uint_as_float(__float_as_uint(2.5f)));
  put(__ldcg(x + lane) - __ldcs(x + lane));
  put(min(mine, 3) + max(mine, 3));
  const int4 four = make_int4(1, 2, 3, mine);
  put(four.x + four.y + four.z + four.w);
  KD_SHARED(double, sum, 1);
  if (lane == 0) sum[0] = 0;
  __syncwarp();
  atomicAdd(sum, 0.5);
  __syncwarp();
  put(sum[0]);
}

using Pair = std::tuple<Tensor, Tensor>;

Pair intrinsics(Tensor x, Tensor counters) {  // [32] int32, [10] int32
  Tensor y = empty(x, ScalarType::Double, {kRows, x.size(0)});
  launch(OnDevice(x), {2, static_cast<int>(x.size(0))}, intrinsics_kernel, static_cast<const int*>(x.data_ptr()),
         static_cast<double*>(y.data_ptr()), static_cast<unsigned*>(counters.data_ptr()));
  return {y, counters};
}

}  // namespace
}  // namespace kdfast

STABLE_TORCH_LIBRARY(kdfast_intrinsics, m) { m.def("run(Tensor x, Tensor(a!) counters) -> (Tensor, Tensor(a!))"); }
STABLE_TORCH_LIBRARY_IMPL(kdfast_intrinsics, CPU, m) { m.impl("run", TORCH_BOX(&kdfast::intrinsics)); }
