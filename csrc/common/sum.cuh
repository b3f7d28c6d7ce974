// Sums over a whole tensor, in an order that depends only on its size.
#pragma once

#include "common/group.cuh"

namespace kdfast {

constexpr int64_t kPerSum = 8192;  // values that one block adds up

struct Partial {
  const double* sums;

  __device__ double operator()(int64_t i) const { return sums[i]; }
};

// Block b sums value(i) over its share of [0, n) into sums[b], and writes the values to `each`; either may be null.
template <class Value, class Each, class Sum>
__global__ void __launch_bounds__(kBlock, kMinBlocks) sum_kernel(Value value, int64_t n, Each* each, Sum* sums) {
  const int64_t begin = blockIdx.x * kPerSum, end = begin + kPerSum < n ? begin + kPerSum : n;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlock) {
    const auto v = value(i);
    if (each) each[i] = v;
    sum += v;
  }
  sum = group_reduce<kBlock>(sum, Add{});
  if (threadIdx.x == 0 && sums) sums[blockIdx.x] = static_cast<Sum>(sum);
}

// *out = the sum of value(i) over [0, n), in at most three levels. Memory for them is taken beside `like`.
template <class Value, class Sum>
void sum_of(const OnDevice& device, const Tensor& like, Value value, int64_t n, Sum* out) {
  const int64_t blocks = n > kPerSum ? blocks_for(n, kPerSum) : 1;
  if (blocks == 1) {
    return launch(device, {1, kBlock}, sum_kernel<Value, double, Sum>, value, n, nullptr, out);
  }
  Tensor partial = empty(like, ScalarType::Double, {blocks});
  double* sums = static_cast<double*>(partial.data_ptr());
  launch(device, {blocks, kBlock}, sum_kernel<Value, double, double>, value, n, nullptr, sums);
  sum_of(device, like, Partial{sums}, blocks, out);
}

}  // namespace kdfast
