#include "common/group.cuh"
#include "common/sum.cuh"
#include "nce/host.h"

namespace kdfast {
namespace nce {
namespace {

constexpr int64_t kPerTask = 256;  // bank rows that a warp scores for one anchor

// One direction: anchors [batch, dim] on the rows of a bank [rows, dim] that index [batch, columns] names.
struct AnchorsOnBank {
  Matrix anchors, bank;
  Column z;
};

struct Both {
  AnchorsOnBank sides[2];  // the student's anchors on the teacher's bank, and the reverse
  const int64_t* index;
  int64_t batch, columns, rows, dim, pieces;  // pieces: tasks of each anchor
  double temperature;

  KD_HD int64_t tasks() const { return batch * pieces; }  // of each direction
};

// What a warp does, and which part of it a thread has: a group of lanes shares a row, kStep of its elements to a lane.
struct Task {
  int64_t number, anchor, begin, end;  // columns [begin, end) of the index
  int side, lane, lanes, groups;       // lanes to a group

  __device__ explicit Task(const Both& both)
      : number(int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp), lane(threadIdx.x % kWarp), lanes(1) {
    side = number >= both.tasks();
    const int64_t own = number - side * both.tasks();
    anchor = own / both.pieces;
    begin = own % both.pieces * kPerTask;
    end = begin + kPerTask < both.columns ? begin + kPerTask : both.columns;
    while (lanes < kWarp && lanes * kStep < both.dim) lanes *= 2;
    groups = kWarp / lanes;
  }

  __device__ bool exists(const Both& both) const { return number < 2 * both.tasks(); }
  __device__ int first_column() const { return lane % lanes * kStep; }  // of the thread's elements of a row
};

// The sum over the lanes of a group, and over the groups of the warp. Every lane gets it.
template <class A>
__device__ A sum_lanes(A x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

template <class A>
__device__ A sum_groups(A x, int lanes) {
  for (int distance = lanes; distance < kWarp; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// use(column, dot, elements of the row that are the thread's) for every row of the group, with several rows in flight.
// A row outside the bank has the dot product NaN. dim <= kSteps * kWarp * kStep.
template <int kSteps, class A, class Use>
__device__ void for_rows(const Both& both, const Task& task, const Use& use) {
  constexpr int kRows = 4 / kSteps;
  const AnchorsOnBank& side = both.sides[task.side];
  const int64_t* index = both.index + task.anchor * both.columns;
  const int64_t stride = int64_t(kWarp) * kStep;
  A anchor[kSteps][kStep];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    read(side.anchors, task.anchor, task.first_column() + s * stride, both.dim, A(0), anchor[s]);
  }
  for (int64_t first = task.begin; first < task.end; first += kRows * task.groups) {
    int64_t at[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t column = first + r * task.groups + task.lane / task.lanes;
      at[r] = column < task.end ? index[column] : 0;
    }
    Step<A> steps[kRows][kSteps];
    A dot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool inside = at[r] >= 0 && at[r] < both.rows;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t cols = inside ? both.dim : 0;
        steps[r][s] = load<A>(side.bank, inside ? at[r] : 0, task.first_column() + s * stride, cols);
      }
      dot[r] = inside ? A(0) : not_a_number<A>();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      A row[kSteps][kStep];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        steps[r][s].convert(A(0), row[s]);
#pragma unroll
        for (int i = 0; i < kStep; ++i) dot[r] += anchor[s][i] * row[s][i];
      }
      dot[r] = sum_lanes(dot[r], task.lanes);
      const int64_t column = first + r * task.groups + task.lane / task.lanes;
      if (column < task.end) use(column, dot[r], row);
    }
  }
}

// The same for rows of any length, which come a second time for their use: use(column, dot, bank row or -1).
template <class A, class Use>
__device__ void for_long_rows(const Both& both, const Task& task, const Use& use) {
  const AnchorsOnBank& side = both.sides[task.side];
  for (int64_t column = task.begin; column < task.end; ++column) {
    const int64_t at = both.index[task.anchor * both.columns + column];
    const bool inside = at >= 0 && at < both.rows;
    A dot = inside ? A(0) : not_a_number<A>();
    for (int64_t c = task.first_column(); inside && c < both.dim; c += kWarp * kStep) {
      A anchor[kStep], row[kStep];
      const Step<A> step = load<A>(side.anchors, task.anchor, c, both.dim);
      read(side.bank, at, c, both.dim, A(0), row);
      step.convert(A(0), anchor);
#pragma unroll
      for (int i = 0; i < kStep; ++i) dot += anchor[i] * row[i];
    }
    use(column, sum_lanes(dot, kWarp), inside ? at : -1);
  }
}

// ---- loss, gradient, scores

// Of one direction, for a thread.
template <class A>
struct Scorer {
  A rate, shift, inverse;
  A* scores;  // [columns] of the anchor, or null
  bool first;

  __device__ Scorer(const Both& both, const Task& task, A* all_scores)
      : scores(all_scores ? all_scores + (task.side * both.batch + task.anchor) * both.columns : nullptr),
        first(task.lane % task.lanes == 0) {
    const Direction direction(read<double>(both.sides[task.side].z, 0), both.temperature, both.columns - 1, both.rows);
    rate = static_cast<A>(direction.rate);
    shift = static_cast<A>(direction.shift);
    inverse = static_cast<A>(1 / both.temperature);
  }

  __device__ Term<A> operator()(int64_t column, A dot) const {
    if (scores && first) scores[column] = dot * inverse;
    return term(dot * rate - shift, column == 0 ? A(-1) : A(1));
  }
};

// losses [2 tasks]: the sum of the terms; parts [2 tasks, dim], or null: of slope * row.
template <class A, int kSteps>
__global__ void __launch_bounds__(kBlock, min_blocks<A>(kSteps == 4 ? 1 : 2))
    score_kernel(Both both, double* losses, A* parts, A* scores) {
  const Task task(both);
  if (!task.exists(both)) return;
  const Scorer<A> scorer(both, task, scores);
  A loss = 0, grad[kSteps][kStep] = {};
  for_rows<kSteps, A>(both, task, [&](int64_t column, A dot, const A(&row)[kSteps][kStep]) {
    const Term<A> t = scorer(column, dot);
    loss += t.loss;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) grad[s][i] += t.slope * row[s][i];
    }
  });
  loss = sum_groups(loss, task.lanes);
  if (task.lane == 0) losses[task.number] = loss;
  if (!parts) return;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < kStep; ++i) grad[s][i] = sum_groups(grad[s][i], task.lanes);
    const int64_t column = task.first_column() + int64_t(s) * kWarp * kStep;
    if (task.lane < task.lanes && column < both.dim) {
      write_step(parts + task.number * both.dim + column, both.dim - column, grad[s]);
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    score_long_kernel(Both both, double* losses, A* parts, A* scores) {
  const Task task(both);
  if (!task.exists(both)) return;
  const Scorer<A> scorer(both, task, scores);
  A loss = 0;
  // Each thread has its own elements of the part.
  A* part = parts ? parts + task.number * both.dim : nullptr;
  for_long_rows<A>(both, task, [&](int64_t column, A dot, int64_t at) {
    const Term<A> t = scorer(column, dot);
    loss += t.loss;
    for (int64_t c = task.first_column(); part && c < both.dim; c += kWarp * kStep) {
      A row[kStep];
      read(both.sides[task.side].bank, at < 0 ? 0 : at, c, at < 0 ? 0 : both.dim, A(0), row);
      for (int i = 0; i < kStep && c + i < both.dim; ++i) {
        part[c + i] = (column == task.begin ? A(0) : part[c + i]) + t.slope * row[i];
      }
    }
  });
  if (task.lane == 0) losses[task.number] = loss;
}

// grads [2][batch, dim] = scale times the sum of each anchor's parts.
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    add_parts_kernel(const A* parts, int64_t batch, int64_t pieces, int64_t dim, double scale, A* student, A* teacher) {
  const int64_t at = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= 2 * batch * dim) return;
  const A* part = parts + at / dim * pieces * dim + at % dim;
  double sum = 0;
  for (int64_t p = 0; p < pieces; ++p) sum += part[p * dim];
  (at < batch * dim ? student[at] : teacher[at - batch * dim]) = static_cast<A>(scale * sum);
}

template <class A>
__global__ void loss_kernel(const double* sum, double constant, double divisor, A* loss) {
  *loss = static_cast<A>((*sum + constant) / divisor);
}

// ---- sums of exponentials
__device__ bool is_known(const Both& both, int side) { return read<double>(both.sides[side].z, 0) >= 0; }

// sums [2 tasks]: of 2^(score in bits), where the direction's Z is unset; else nothing is read or written.
template <class A, int kSteps>
__global__ void __launch_bounds__(kBlock, kSteps == 1 ? 2 : kMinBlocks) log_sums_kernel(Both both, LogSum* sums) {
  const Task task(both);
  if (!task.exists(both) || is_known(both, task.side)) return;
  const double rate = kLog2E / both.temperature;
  LogSum sum;
  if constexpr (kSteps > 0) {
    for_rows<kSteps, A>(both, task,
                        [&](int64_t, A dot, const A(&)[kSteps][kStep]) { sum.add({double(dot) * rate, 1}); });
    for (int distance = task.lanes; distance < kWarp; distance *= 2) {
      const double max = __shfl_xor_sync(0xffffffffu, sum.max, distance);
      sum.add({max, __shfl_xor_sync(0xffffffffu, sum.sum, distance)});
    }
  } else {
    for_long_rows<A>(both, task, [&](int64_t, A dot, int64_t) { sum.add({double(dot) * rate, 1}); });
  }
  if (task.lane == 0) sums[task.number] = sum;
}

__global__ void finish_log_sums_kernel(Both both, const LogSum* sums, double* out) {
  const int side = threadIdx.x;
  if (side > 1) return;
  LogSum sum;
  if (!is_known(both, side)) {
    for (int64_t i = 0; i < both.tasks(); ++i) sum.add(sums[side * both.tasks() + i]);
  }
  out[side] = is_known(both, side) ? 0 : sum.nats();
}

// ---- the update of a bank: a warp to each row of the batch
template <class A>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    update_bank_kernel(Matrix bank, int64_t bank_rows, Matrix rows, int64_t n, int64_t dim, const int64_t* index,
                       A momentum) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= n) return;
  const int64_t at = index[i];
  if (at < 0 || at >= bank_rows) return;
  int later = 0;  // a later row of the batch is for the same row of the bank
  for (int64_t j = i + 1 + lane; j < n; j += kWarp) later |= index[j] == at;
  if (group_reduce<kWarp>(later, Max{})) return;
  const auto moved = [&](int64_t c, A(&to)[kStep]) {
    A old[kStep], row[kStep];
    const Step<A> step = load<A>(bank, at, c, dim);
    read(rows, i, c, dim, A(0), row);
    step.convert(A(0), old);
#pragma unroll
    for (int e = 0; e < kStep; ++e) to[e] = momentum * old[e] + (A(1) - momentum) * row[e];
  };
  A square = 0, values[kStep];
  for (int64_t c = lane * kStep; c < dim; c += kWarp * kStep) {
    moved(c, values);
#pragma unroll
    for (int e = 0; e < kStep; ++e) square += values[e] * values[e];
  }
  const A norm = std::sqrt(group_reduce<kWarp>(square, Add{}));
  if (!(norm > 0 && norm < infinity<A>())) return;  // no direction: the row stays
  for (int64_t c = lane * kStep; c < dim; c += kWarp * kStep) {
    moved(c, values);
#pragma unroll
    for (int e = 0; e < kStep; ++e) values[e] = values[e] / norm;
    write(bank, at, c, dim, values);
  }
}

// ---- drawing: a thread to each entry of the result
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    draw_kernel(const int64_t* index, int64_t n, int64_t columns, Source source, const uint64_t* seed, int64_t* out) {
  const int64_t at = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= n * columns) return;
  const int64_t positive = index[at / columns], column = at % columns;
  if (positive < 0 || positive >= source.rows) source.labels = nullptr;  // no class to leave out
  source.key = *seed;
  out[at] = column == 0 ? positive : source.draw(positive, static_cast<uint32_t>(column - 1));
}

Both both_of(const Inputs& in) {
  return {{{matrix(in.student), matrix(in.bank_teacher), column(in.z_student)},
           {matrix(in.teacher), matrix(in.bank_student), column(in.z_teacher)}},
          data<const int64_t>(in.index),
          in.index.size(0),
          in.index.size(1),
          in.bank_student.size(0),
          in.student.size(1),
          blocks_for(in.index.size(1), kPerTask),
          in.temperature};
}

// f(steps) with how many steps of kStep elements a lane needs for a row, as a constant; 0 if more than 4.
template <class F>
void dispatch_steps(int64_t dim, const F& f) {
  const int64_t step = int64_t(kWarp) * kStep;
  if (dim <= step) return f(std::integral_constant<int, 1>{});
  if (dim <= 2 * step) return f(std::integral_constant<int, 2>{});
  if (dim <= 4 * step) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 0>{});
}

struct Cuda : DeviceBackend {
  using DeviceBackend::DeviceBackend;

  template <class A>
  void score(const Inputs& in, A* loss, A* student_grad, A* teacher_grad, A* scores) const {
    const Both both = both_of(in);
    const int64_t tasks = 2 * both.tasks(), blocks = blocks_for(tasks, kWarps);
    DeviceMemory<double> losses(in.index, tasks + 1);
    DeviceMemory<A> parts(in.index, student_grad ? tasks * both.dim : 0);
    double* each = losses.data();
    A* part = student_grad ? parts.data() : nullptr;
    if (tasks > 0) {
      dispatch_steps(both.dim, [&](auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        if constexpr (kSteps > 0) {
          launch(device, {blocks, kBlock}, score_kernel<A, kSteps>, both, each, part, scores);
        } else {
          launch(device, {blocks, kBlock}, score_long_kernel<A>, both, each, part, scores);
        }
      });
    }
    if (part && tasks > 0) {
      launch(device, {blocks_for(2 * both.batch * both.dim, kBlock), kBlock}, add_parts_kernel<A>, part, both.batch,
             both.pieces, both.dim, 1 / (both.temperature * both.batch), student_grad, teacher_grad);
    }
    sum_of(device, in.index, Partial{each}, tasks, each + tasks);
    const Direction direction(1, both.temperature, both.columns - 1, both.rows);  // for what does not depend on Z
    const double constant = 2 * direction.constant * static_cast<double>((both.columns - 1) * both.batch);
    launch(device, {1, 1}, loss_kernel<A>, each + tasks, constant, both.batch ? double(both.batch) : 1.0, loss);
  }

  template <class A>
  void log_sums(const Inputs& in, double* out) const {
    const Both both = both_of(in);
    const int64_t tasks = 2 * both.tasks();
    Tensor sums = empty(in.student, ScalarType::Double, {tasks, 2});
    LogSum* each = data<LogSum>(sums);
    if (tasks > 0) {
      dispatch_steps(both.dim, [&](auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        launch(device, {blocks_for(tasks, kWarps), kBlock}, log_sums_kernel<A, kSteps>, both, each);
      });
    }
    launch(device, {1, kWarp}, finish_log_sums_kernel, both, each, out);
  }

  template <class A>
  void update(const Tensor& bank, const Tensor& rows, const Tensor& index, A momentum) const {
    const int64_t n = rows.size(0);
    if (n == 0) return;
    launch(device, {blocks_for(n, kWarps), kBlock}, update_bank_kernel<A>, matrix(bank), bank.size(0), matrix(rows), n,
           bank.size(1), data<const int64_t>(index), momentum);
  }

  void draw(const Tensor& index, const Source& source, const uint64_t* seed, int64_t columns, int64_t* out) const {
    const int64_t n = index.size(0);
    if (n == 0) return;
    launch(device, {blocks_for(n * columns, kBlock), kBlock}, draw_kernel, data<const int64_t>(index), n, columns,
           source, seed, out);
  }
};

}  // namespace
}  // namespace nce
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(KD_CUDA_LIBRARY, KD_CUDA_KEY, m) { kdfast::nce::register_ops<kdfast::nce::Cuda>(m); }
