#include "attention/host.h"
#include "common/group.cuh"
#include "common/sum.cuh"

namespace kdfast {
namespace attention {
namespace {

constexpr int kWide = kWarp * kStep;  // contiguous elements that a warp reads in one access

// Channels that a warp has in flight. P = 0 is any power, which takes registers of its own.
template <int P>
constexpr int kAtOnce = P == 0 ? 1 : 4;

// A tensor x [B, C, N].
struct Maps {
  void* data;
  ScalarType dtype;
  int64_t batch, channels, positions, batch_stride, channel_stride, position_stride;

  explicit Maps(const Tensor& x)
      : data(x.data_ptr()),
        dtype(x.scalar_type()),
        batch(x.size(0)),
        channels(x.size(1)),
        positions(x.size(2)),
        batch_stride(x.stride(0)),
        channel_stride(x.stride(1)),
        position_stride(x.stride(2)) {}

  // kStep positions of a channel, or (along channels) kStep channels of a position.
  template <class A>
  __device__ Step<A> load(int64_t b, int64_t c, int64_t n, bool along_channels) const {
    const int64_t row = along_channels ? n : c, col = along_channels ? c : n;
    Matrix m{data, dtype, along_channels ? position_stride : channel_stride,
             along_channels ? channel_stride : position_stride};
    m.data = static_cast<char*>(data) + b * batch_stride * bytes_of(dtype);
    return kdfast::load<A>(m, row, col, along_channels ? channels : positions);
  }
};

// sums [B, N] = sum over channels of x^p. A block has kWide positions, its warps take turns on the channels.
template <int P, class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(2)) sum_channels_kernel(Maps x, int64_t p, A* sums) {
  const int64_t pieces = (x.positions + kWide - 1) / kWide, b = blockIdx.x / pieces;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = blockIdx.x % pieces * kWide + lane * kStep;
  KD_SHARED(A, of_warp, kWarps * kWide);
  A sum[kStep] = {};
  if (n < x.positions) {
    for (int64_t c = warp; c < x.channels; c += kAtOnce<P> * kWarps) {
      Step<A> steps[kAtOnce<P>];
#pragma unroll
      for (int k = 0; k < kAtOnce<P>; ++k) {
        steps[k] = x.load<A>(b, c + k * kWarps < x.channels ? c + k * kWarps : c, n, false);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce<P>; ++k) {
        if (c + k * kWarps >= x.channels) break;
        A value[kStep];
        steps[k].convert(A(0), value);
#pragma unroll
        for (int i = 0; i < kStep; ++i) sum[i] += power<P>(value[i], p);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kStep; ++i) of_warp[warp * kWide + i * kWarp + lane] = sum[i];
  __syncthreads();
  // Thread t ends the sum of position t of the block.
  const int64_t own = blockIdx.x % pieces * kWide + threadIdx.x;
  if (own >= x.positions) return;
  A total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w * kWide + threadIdx.x % kStep * kWarp + threadIdx.x / kStep];
  sums[b * x.positions + own] = total;
}

// The same where channels are neighbours: a warp has a position.
template <int P, class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks) sum_neighbours_kernel(Maps x, int64_t p, A* sums) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= x.batch * x.positions) return;
  A sum = 0;
  for (int64_t c = threadIdx.x % kWarp * kStep; c < x.channels; c += kWide) {
    A value[kStep];
    x.load<A>(row / x.positions, c, row % x.positions, true).convert(A(0), value);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum += c + i < x.channels ? power<P>(value[i], p) : A(0);
  }
  sum = group_reduce<kWarp>(sum, Add{});
  if (threadIdx.x % kWarp == 0) sums[row] = sum;
}

template <class A>
void write_maps(const OnDevice& device, const Tensor& tensor, int64_t p, A* sums) {
  const Maps x(tensor);
  dispatch_power(p, [&](auto exponent) {
    constexpr int kP = decltype(exponent)::value;
    if (is_channels_last(tensor)) {
      launch(device, {blocks_for(x.batch * x.positions, kWarps), kBlock}, sum_neighbours_kernel<kP, A>, x, p, sums);
    } else {
      launch(device, {x.batch * blocks_for(x.positions, kWide), kBlock}, sum_channels_kernel<kP, A>, x, p, sums);
    }
  });
}

// The loss of one sample, a block's, and its slopes in place of the maps.
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    compare_kernel(A* maps_s, A* maps_t, int64_t positions, int64_t channels_s, int64_t channels_t, A factor,
                   bool need_student, bool need_teacher, double* losses) {
  A *m_s = maps_s + blockIdx.x * positions, *m_t = maps_t + blockIdx.x * positions;
  double square_s = 0, square_t = 0;
  for (int64_t n = threadIdx.x; n < positions; n += kBlock) {
    square_s += static_cast<double>(m_s[n]) * m_s[n];
    square_t += static_cast<double>(m_t[n]) * m_t[n];
  }
  square_s = group_reduce<kBlock>(square_s, Add{});
  square_t = group_reduce<kBlock>(square_t, Add{});
  const Norms<A> norms(square_s, square_t, channels_s, channels_t);
  double loss = 0, along_s = 0, along_t = 0;
  for (int64_t n = threadIdx.x; n < positions; n += kBlock) {
    const double gap = norms.gap(m_s[n], m_t[n]);
    loss += gap * gap;
    along_s += gap * (m_s[n] * norms.inverse_s);
    along_t += gap * (m_t[n] * norms.inverse_t);
  }
  loss = group_reduce<kBlock>(loss, Add{});
  along_s = norms.floored_s ? 0 : group_reduce<kBlock>(along_s, Add{});
  along_t = norms.floored_t ? 0 : group_reduce<kBlock>(along_t, Add{});
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
  for (int64_t n = threadIdx.x; n < positions; n += kBlock) {
    const A gap = norms.gap(m_s[n], m_t[n]), q_s = m_s[n] * norms.inverse_s, q_t = m_t[n] * norms.inverse_t;
    if (need_student) m_s[n] = factor * slope(q_s, gap, static_cast<A>(along_s), norms.inverse_s);
    if (need_teacher) m_t[n] = -factor * slope(q_t, gap, static_cast<A>(along_t), norms.inverse_t);
  }
}

template <class A>
__global__ void loss_kernel(const double* sum, double entries, A* loss) {
  *loss = static_cast<A>(*sum / entries);
}

// slope_n x_cn^(p-1). A thread has kStep neighbours in memory; out [B, rows, cols] lies as x does.
template <int P, class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    gradient_kernel(Maps x, Column grad, const A* slopes, int64_t p, bool last, Matrix out) {
  const int64_t rows = last ? x.positions : x.channels, cols = last ? x.channels : x.positions;
  const int64_t pieces = (cols + kStep - 1) / kStep, at = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= x.batch * rows * pieces) return;
  const int64_t row = at / pieces, col = at % pieces * kStep, b = row / rows, r = row % rows;
  const A upstream = read<A>(grad, 0);
  const A* of_sample = slopes + b * x.positions;
  const Step<A> step = x.load<A>(b, last ? col : r, last ? r : col, last);
  A value[kStep], slope[kStep];
#pragma unroll
  for (int i = 0; i < kStep; ++i) slope[i] = of_sample[last ? r : col + i < cols ? col + i : col];
  step.convert(A(0), value);
#pragma unroll
  for (int i = 0; i < kStep; ++i) value[i] = upstream * slope[i] * power<P>(value[i], p);
  write(out, row, col, cols, value);
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void transfer(const Tensor& student, const Tensor& teacher, int64_t p, bool need_student, bool need_teacher, A* s,
                A* t, Tensor& loss) const {
    const int64_t batch = student.size(0), positions = student.size(2);
    if (batch == 0) {
      torch::stable::zero_(loss);
      return;
    }
    write_maps(device, student, p, s);
    write_maps(device, teacher, p, t);
    DeviceMemory<double> losses(student, batch + 1);
    const double entries = static_cast<double>(batch) * static_cast<double>(positions);
    launch(device, {batch, kBlock}, compare_kernel<A>, s, t, positions, student.size(1), teacher.size(1),
           static_cast<A>(2.0 * static_cast<double>(p) / entries), need_student, need_teacher, losses.data());
    sum_of(device, student, Partial{losses.data()}, batch, losses.data() + batch);
    launch(device, {1, 1}, loss_kernel<A>, losses.data() + batch, entries, data<A>(loss));
  }

  template <class A>
  void gradient(const Column& grad, const A* slopes, const Tensor& x, int64_t p, const Matrix& out) const {
    const Maps maps(x);
    const bool last = is_channels_last(x);
    const int64_t rows = last ? maps.positions : maps.channels, cols = last ? maps.channels : maps.positions;
    const int64_t blocks = blocks_for(maps.batch * rows * blocks_for(cols, kStep), kBlock);
    if (blocks == 0) return;
    dispatch_power(p - 1, [&](auto exponent) {
      constexpr int kP = decltype(exponent)::value;
      launch(device, {blocks, kBlock}, gradient_kernel<kP, A>, maps, grad, slopes, p - 1, last, out);
    });
  }
};

}  // namespace
}  // namespace attention
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::attention::register_ops<kdfast::attention::Cuda>(m);
}
