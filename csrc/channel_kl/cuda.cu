#include <algorithm>

#include "channel_kl/host.h"
#include "common/rows.cuh"
#include "common/sum.cuh"
#include "softmax_kl/sweep.cuh"

namespace kdfast {
namespace channel_kl {
namespace {

constexpr int kPositions = kWarps * kStep;  // that a block takes in one round
constexpr int64_t kMinRounds = 4, kMaxPieces = 64;

// Lanes are neighbouring channels, 32 to a block; each warp reads kStep positions at once. A sample's positions are cut
// into pieces of `rounds` rounds, one for each block.
struct Plan {
  int64_t batch, channels, all, tiles, rounds, pieces;

  Plan(int64_t batch, const Order& order)
      : batch(batch), channels(order.inner), all(order.outer), tiles(blocks_for(channels, kWarp)) {
    rounds = std::max(kMinRounds, blocks_for(all, kPositions * kMaxPieces));
    pieces = blocks_for(all, rounds * kPositions);
  }
  Grid grid() const { return {batch * tiles * pieces, kBlock}; }
  Grid channel_grid() const { return {batch * tiles, kBlock}; }  // a block has all pieces of 32 channels
};

// Where a thread is.
struct Place {
  int64_t sample, piece, channel;
  bool inside;

  __device__ Place(const Plan& plan, int64_t pieces) {
    const int64_t tile = blockIdx.x % plan.tiles, rest = blockIdx.x / plan.tiles;
    piece = rest % pieces;
    sample = rest / pieces;
    channel = tile * kWarp + threadIdx.x % kWarp;
    inside = channel < plan.channels;
  }
  __device__ int64_t row(const Plan& plan) const { return sample * plan.channels + channel; }
  // Of what each piece has for each channel.
  __device__ int64_t part(const Plan& plan, int64_t of_piece) const {
    return (sample * plan.pieces + of_piece) * plan.channels + channel;
  }
};

// f(first position) for the steps of this thread.
template <class F>
__device__ void for_positions(const Plan& plan, const Place& place, const F& f) {
  const int64_t begin = place.piece * plan.rounds * kPositions + threadIdx.x / kWarp * kStep;
  for (int64_t round = 0; round < plan.rounds; ++round) {
    const int64_t position = begin + round * kPositions;
    if (position >= plan.all) return;
    f(position);
  }
}

// A channel at kStep positions; -inf where there is none.
template <class A>
__device__ void read_step(const Map& x, const Plan& plan, const Place& place, int64_t position, A (&to)[kStep]) {
  const int64_t first = place.sample * x.sample + place.channel * x.inner + position * x.outer;
  const int64_t left = plan.all - position;
  Raw<A, kStep> raw;
  raw.gather(x.data, x.dtype, [&](int i) { return Element{i < left, first + i * x.outer}; });
  raw.convert(x.dtype, to);
#pragma unroll
  for (int i = 0; i < kStep; ++i) to[i] = i < left ? to[i] : -infinity<A>();
}

// ---- forward
template <class A>
using State = KlState<A, A>;

// A state in memory, which has no initial value.
template <class A>
struct Stored {
  A max_p, max_q, sum_p, sum_q, dot;

  __device__ State<A> state() const { return {max_p, max_q, sum_p, sum_q, dot}; }
  __device__ void set(const State<A>& x) { *this = {x.max_p, x.max_q, x.sum_p, x.sum_q, x.dot}; }
};

template <class A>
__device__ void add(State<A>& s, State<A> other, A rate) {
  const A top_p = max(s.max_p, other.max_p), top_q = max(s.max_q, other.max_q);
  s.rebase(top_p, top_q, rate);
  other.rebase(top_p, top_q, rate);
  s.sum_p += other.sum_p;
  s.sum_q += other.sum_q;
  s.dot += other.dot;
}

// merge(i) adds entry i of shared memory to this thread's own; those of a block's warps, in a fixed order. put() writes
// this thread's. The first warp has the sums of its channels.
template <class Put, class Merge>
__device__ void merge_warps(const Put& put, const Merge& merge) {
  for (int half = kBlock / 2; half >= kWarp; half /= 2) {
    if (threadIdx.x >= half && threadIdx.x < 2 * half) put();
    __syncthreads();
    if (threadIdx.x < half) merge(threadIdx.x + half);
    __syncthreads();
  }
}

template <class A>
__device__ void merge_states(State<A>& own, A rate) {
  KD_SHARED(Stored<A>, shared, kBlock);
  merge_warps([&] { shared[threadIdx.x].set(own); }, [&](int i) { add(own, shared[i].state(), rate); });
}

template <class A>
__device__ void merge_sums(A& own) {
  KD_SHARED(A, shared, kBlock);
  merge_warps([&] { shared[threadIdx.x] = own; }, [&](int i) { own += shared[i]; });
}

// parts [batch, pieces, channels]
template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    state_kernel(Map student, Map teacher, Plan plan, A rate, Stored<A>* parts) {
  const Place place(plan, plan.pieces);
  State<A> own;
  if (place.inside) {
    for_positions(plan, place, [&](int64_t position) {
      A z_p[kStep], z_q[kStep];
      read_step(teacher, plan, place, position, z_p);
      read_step(student, plan, place, position, z_q);
      softmax_kl::kl_update(own, z_p, z_q, rate);
    });
  }
  merge_states(own, rate);
  if (threadIdx.x < kWarp && place.inside) parts[place.part(plan, place.piece)].set(own);
}

template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    channel_kernel(const Stored<A>* parts, Plan plan, A rate, Statistics<A> statistics) {
  const Place place(plan, 1);
  State<A> own;
  for (int64_t piece = threadIdx.x / kWarp; piece < plan.pieces && place.inside; piece += kWarps) {
    add(own, parts[place.part(plan, piece)].state(), rate);
  }
  merge_states(own, rate);
  if (threadIdx.x < kWarp && place.inside) statistics.set(place.row(plan), own, own.kl(rate));
}

// The terms of near channels; sums [batch, pieces, channels] have no value for others.
template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    near_kernel(Map student, Map teacher, Plan plan, A rate, Statistics<A> statistics, A* sums) {
  const Place place(plan, plan.pieces);
  const bool near = place.inside && statistics.is_near(place.row(plan));
  A own = 0;
  if (near) {
    const NearRow<A> row = statistics.near(place.row(plan), rate);
    for_positions(plan, place, [&](int64_t position) {
      A z_p[kStep], z_q[kStep];
      read_step(teacher, plan, place, position, z_p);
      read_step(student, plan, place, position, z_q);
      const int64_t left = plan.all - position;
#pragma unroll
      for (int i = 0; i < kStep; ++i) own += i < left ? row.term(z_p[i], z_q[i]) : A(0);
    });
  }
  merge_sums(own);
  if (threadIdx.x < kWarp && near) sums[place.part(plan, place.piece)] = own;
}

template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    near_channel_kernel(const A* sums, Plan plan, Statistics<A> statistics) {
  const Place place(plan, 1);
  const bool near = place.inside && statistics.is_near(place.row(plan));
  A own = 0;
  for (int64_t piece = threadIdx.x / kWarp; piece < plan.pieces && near; piece += kWarps) {
    own += sums[place.part(plan, piece)];
  }
  merge_sums(own);
  if (threadIdx.x < kWarp && near) statistics.at(kKl, place.row(plan)) = own;
}

template <class A>
struct RowLoss {
  Statistics<A> statistics;
  double scale;

  __device__ double operator()(int64_t row) const { return scale * statistics.at(kKl, row); }
};

// ---- backward
template <class A, class Slope>
__device__ void write_step(const MapGrad& to, const Plan& plan, const Place& place, int64_t position,
                           const Slope& slope) {
  if (!to.data) return;
  const int64_t first = (place.sample * plan.all + position) * plan.channels + place.channel;
  dispatch_float(to.dtype, [&](auto tag) {
    using T = decltype(tag);
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i < plan.all - position) static_cast<T*>(to.data)[first + i * plan.channels] = static_cast<T>(slope(i));
    }
  });
}

template <class A>
__global__ void __launch_bounds__(kBlock, min_blocks<A>())
    slope_kernel(Map student, Map teacher, Plan plan, A rate, Statistics<A> statistics, Column grad, A factor,
                 MapGrad to_student, MapGrad to_teacher) {
  const Place place(plan, plan.pieces);
  if (!place.inside) return;
  const int64_t row = place.row(plan);
  const KlGrad<A> g = statistics.gradient(row, factor * read<A>(grad, 0), rate);
  const A max_p = statistics.at(kMaxT, row), max_q = statistics.at(kMaxS, row);
  for_positions(plan, place, [&](int64_t position) {
    A z_p[kStep], z_q[kStep];
    read_step(teacher, plan, place, position, z_p);
    read_step(student, plan, place, position, z_q);
    write_step<A>(to_student, plan, place, position, [&](int i) {
      return softmax_kl::kl_grad_q(g, exp2((z_p[i] - max_p) * rate), exp2((z_q[i] - max_q) * rate));
    });
    write_step<A>(to_teacher, plan, place, position, [&](int i) {
      const A c_p = z_p[i] - max_p;
      return softmax_kl::kl_grad_p(g, exp2(c_p * rate), c_p - (z_q[i] - max_q));
    });
  });
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void forward(const Tensor& student, const Tensor& teacher, const Order& order, double temperature,
               const Statistics<A>& statistics, A* loss) const {
    const Plan plan(student.size(0), order);
    const Map s = map(student, order), t = map(teacher, order);
    const A rate = static_cast<A>(kLog2E / temperature);
    const int64_t parts = plan.batch * plan.pieces * plan.channels;
    Tensor memory = empty(student, kDtype<A>, {parts, sizeof(Stored<A>) / sizeof(A)});
    A* const values = data<A>(memory);
    Stored<A>* const states = static_cast<Stored<A>*>(memory.data_ptr());
    if (parts > 0) launch(device, plan.grid(), state_kernel<A>, s, t, plan, rate, states);
    if (statistics.rows > 0) {
      launch(device, plan.channel_grid(), channel_kernel<A>, states, plan, rate, statistics);
    }
    if (parts > 0) {
      launch(device, plan.grid(), near_kernel<A>, s, t, plan, rate, statistics, values);
      launch(device, plan.channel_grid(), near_channel_kernel<A>, values, plan, statistics);
    }
    const double rows = static_cast<double>(std::max<int64_t>(statistics.rows, 1));
    sum_of(device, student, RowLoss<A>{statistics, temperature * temperature / rows}, statistics.rows, loss);
  }

  template <class A>
  void backward(const Column& grad, const Tensor& student, const Tensor& teacher, const Order& order,
                double temperature, const Statistics<A>& statistics, const MapGrad& to_student,
                const MapGrad& to_teacher) const {
    const Plan plan(student.size(0), order);
    const A factor = static_cast<A>(temperature / static_cast<double>(statistics.rows));
    launch(device, plan.grid(), slope_kernel<A>, map(student, order), map(teacher, order), plan,
           static_cast<A>(kLog2E / temperature), statistics, grad, factor, to_student, to_teacher);
  }
};

}  // namespace
}  // namespace channel_kl
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) {
  kdfast::channel_kl::register_ops<kdfast::channel_kl::Cuda>(m);
}
