#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "common/chunk.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/vector_loop.h"
#include "nce/host.h"

namespace kdfast {
namespace nce {
namespace {

// Rows are scored in tiles that stay in the L1 cache until they have been added to the gradient; while one tile is
// scored, the next one is prefetched. A task is one anchor with some of its rows: their number, and with it the
// order of every sum, depends on the shapes alone.
constexpr int64_t kTile = 16;
constexpr int64_t kPerTask = 2048;
constexpr int64_t kLine = 64;  // bytes of a cache line

// ---- one tile
template <class A>
struct Tile {
  const A* rows[kTile];     // [dim], whole vectors; the last tile repeats a row
  const char* next[kTile];  // the rows of the next tile, as they are in memory
  int64_t count;            // rows that are not repeated
  bool positive;            // row 0 is the positive
};

template <class A>
KD_HD void dot_products(const Tile<A>& tile, const A* anchor, int64_t dim, int64_t bytes, A* dots) {
  constexpr int64_t kUnroll = 4;
  for (int64_t r = 0; r < kTile; r += kUnroll) {
    Lanes<A> sum[kUnroll] = {};
    for (int64_t c = 0; c < dim; c += kLanesOf<A>) {
      const Lanes<A> a = load(anchor + c);
      for (int64_t q = 0; q < kUnroll; ++q) sum[q] += a * load(tile.rows[r + q] + c);
    }
    for (int64_t q = 0; q < kUnroll; ++q) {
      for (int64_t line = 0; line < bytes; line += kLine) __builtin_prefetch(tile.next[r + q] + line);
      dots[r + q] = lane_sum<A>(sum[q]);
    }
  }
}

// grad[c] += sum over the tile of weights[r] * rows[r][c], for kVectors registers at c.
template <int64_t kVectors, class A>
KD_HD void add_rows(const Tile<A>& tile, const A* weights, int64_t c, A* grad) {
  constexpr int64_t kWidth = kRegisterOf<A>;
  Register<A> sum[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) sum[v] = load_register(grad + c + v * kWidth);
  for (int64_t r = 0; r < kTile; ++r) {
    const Register<A> weight = fill_register(weights[r]);
    for (int64_t v = 0; v < kVectors; ++v) sum[v] += weight * load_register(tile.rows[r] + c + v * kWidth);
  }
  for (int64_t v = 0; v < kVectors; ++v) store_register<A>(grad + c + v * kWidth, sum[v]);
}

// -> the sum of the terms; adds slope * row to `grad`, if that is wanted, and leaves the dot products.
template <class A>
A score_tile(const Tile<A>& tile, const A* anchor, int64_t dim, int64_t bytes, A rate, A shift, A* dots, A* grad) {
  alignas(64) A weights[kTile], sign[kTile];
  dot_products(tile, anchor, dim, bytes, dots);
  for (int64_t r = 0; r < kTile; ++r) sign[r] = 1;
  if (tile.positive) sign[0] = -1;
  const int64_t count = tile.count;
  const A loss = sum_each<A>(kTile, [&](int64_t r) KD_INLINED {
    const Term<A> t = term(dots[r] * rate - shift, sign[r]);
    weights[r] = r < count ? t.slope : A(0);
    return r < count ? t.loss : A(0);
  });
  if (!grad) return loss;
  int64_t c = 0;
  for (; c + 8 * kRegisterOf<A> <= dim; c += 8 * kRegisterOf<A>) add_rows<8>(tile, weights, c, grad);
  for (; c < dim; c += kRegisterOf<A>) add_rows<1>(tile, weights, c, grad);
  return loss;
}

template <class A>
void dot_tile(const Tile<A>& tile, const A* anchor, int64_t dim, int64_t bytes, A* dots) {
  dot_products(tile, anchor, dim, bytes, dots);
}

// ---- the rows of a task, tile by tile
struct Bank {
  const char* data;
  ScalarType dtype;
  int64_t rows, dim, bytes;  // bytes of a row

  explicit Bank(const Tensor& x)
      : data(static_cast<const char*>(x.data_ptr())),
        dtype(x.scalar_type()),
        rows(x.size(0)),
        dim(x.size(1)),
        bytes(x.size(1) * static_cast<int64_t>(x.element_size())) {}
};

template <class A>
int64_t whole_vectors(int64_t dim) {
  return (dim + kLanesOf<A> - 1) / kLanesOf<A> * kLanesOf<A>;
}

// f(tile, first column) for the columns [begin, end) of one anchor's index.
template <class A, class F>
void for_tiles(const Bank& bank, const int64_t* index, int64_t begin, int64_t end, const F& f) {
  const int64_t dim = whole_vectors<A>(bank.dim);
  const bool in_place = bank.dtype == kDtype<A> && bank.dim == dim;
  std::vector<A> copies(in_place ? 0 : kTile * dim + kLanesOf<A>);
  const auto row_at = [&](int64_t column) { return bank.data + index[std::min(column, end - 1)] * bank.bytes; };
  Tile<A> tile;
  for (int64_t r = 0; r < kTile; ++r) {
    tile.next[r] = row_at(begin + r);
    for (int64_t line = 0; line < bank.bytes; line += kLine) __builtin_prefetch(tile.next[r] + line);
  }
  for (int64_t first = begin; first < end; first += kTile) {
    const char* own[kTile];
    for (int64_t r = 0; r < kTile; ++r) {
      own[r] = tile.next[r];
      tile.next[r] = row_at(first + kTile + r);
      tile.rows[r] = in_place ? reinterpret_cast<const A*>(own[r]) : copies.data() + r * dim;
    }
    if (!in_place) {
      dispatch_float(bank.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t r = 0; r < kTile; ++r) {
          widen(reinterpret_cast<const T*>(own[r]), 1, bank.dim, copies.data() + r * dim);  // zeros follow
        }
      });
    }
    tile.count = std::min(kTile, end - first);
    tile.positive = first == 0;
    f(tile, first);
  }
}

// The anchors as A, with zeros up to whole vectors.
template <class A>
Tensor padded_anchors(const Tensor& x) {
  const int64_t rows = x.size(0), cols = x.size(1), dim = whole_vectors<A>(cols);
  Tensor out = empty(x, kDtype<A>, {rows, dim});
  dispatch_float(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < rows; ++i) {
      A* to = static_cast<A*>(out.data_ptr()) + i * dim;
      widen(static_cast<const T*>(x.data_ptr()) + i * x.stride(0), x.stride(1), cols, to);
      std::fill(to + cols, to + dim, A(0));
    }
  });
  return out;
}

// ---- checks
template <class Position>
void check_rows(const int64_t* index, int64_t n, int64_t rows, const char* name, const Position& position) {
  constexpr int64_t kBlock = 1 << 16;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<char> wrong(blocks);
  for_each(blocks, 1, [&](int64_t block) {
    const int64_t end = std::min(n, (block + 1) * kBlock);
    bool outside = false;
    for (int64_t i = block * kBlock; i < end; ++i) outside |= static_cast<uint64_t>(index[i]) >= uint64_t(rows);
    wrong[block] = outside;
  });
  const int64_t block = std::find(wrong.begin(), wrong.end(), 1) - wrong.begin();
  if (block == blocks) return;
  int64_t i = block * kBlock;
  while (static_cast<uint64_t>(index[i]) < uint64_t(rows)) ++i;
  throw std::out_of_range(std::string(name) + "[" + position(i) + "] is " + std::to_string(index[i]) +
                          ", expected a row from 0 to " + std::to_string(rows - 1));
}

void check_contrast_index(const Tensor& index, int64_t rows) {
  const int64_t columns = index.size(1);
  check_rows(static_cast<const int64_t*>(index.data_ptr()), index.numel(), rows, "contrast_index",
             [&](int64_t i) { return std::to_string(i / columns) + ", " + std::to_string(i % columns); });
}

void check_index(const Tensor& index, int64_t rows) {
  check_rows(static_cast<const int64_t*>(index.data_ptr()), index.numel(), rows, "index",
             [](int64_t i) { return std::to_string(i); });
}

// ---- scores
struct Tasks {
  int64_t anchors, columns, pieces;  // pieces: tasks of each anchor

  explicit Tasks(const Tensor& index)
      : anchors(index.size(0)), columns(index.size(1)), pieces((columns + kPerTask - 1) / kPerTask) {}

  int64_t count() const { return anchors * pieces; }

  // f(task, anchor, begin, end): the columns [begin, end) of the anchor.
  template <class F>
  void for_all(const F& f) const {
    for_each(count(), 1, [&](int64_t task) {
      const int64_t begin = task % pieces * kPerTask;
      f(task, task / pieces, begin, std::min(begin + kPerTask, columns));
    });
  }
};

// One direction: -> the sum of the terms over the batch; the gradient of their mean in `grad` [B, D], the scores in
// `scores` [B, K + 1], where these are not null.
template <class A>
double score(const Tensor& anchors, const Bank& bank, const Tensor& index, double z, double temperature, A* grad,
             A* scores) {
  const Tasks tasks(index);
  const Direction direction(z, temperature, tasks.columns - 1, bank.rows);
  const A rate = static_cast<A>(direction.rate), shift = static_cast<A>(direction.shift);
  const int64_t dim = whole_vectors<A>(bank.dim);
  const Tensor padded = padded_anchors<A>(anchors);
  const Tensor parts = empty(anchors, kDtype<A>, {grad ? tasks.count() : 0, dim});
  std::vector<double> losses(tasks.count());
  tasks.for_all([&](int64_t task, int64_t b, int64_t begin, int64_t end) {
    const A* anchor = static_cast<const A*>(padded.data_ptr()) + b * dim;
    const int64_t* own = static_cast<const int64_t*>(index.data_ptr()) + b * tasks.columns;
    A* part = grad ? static_cast<A*>(parts.data_ptr()) + task * dim : nullptr;
    if (part) std::fill(part, part + dim, A(0));
    alignas(64) A dots[kTile];
    double loss = 0;
    for_tiles<A>(bank, own, begin, end, [&](const Tile<A>& tile, int64_t first) {
      loss += score_tile(tile, anchor, dim, bank.bytes, rate, shift, dots, part);
      for (int64_t r = 0; scores && r < tile.count; ++r) {
        scores[b * tasks.columns + first + r] = dots[r] * static_cast<A>(1 / temperature);
      }
    });
    losses[task] = loss;
  });
  const double scale = 1 / (temperature * std::max<int64_t>(tasks.anchors, 1));
  for (int64_t b = 0; grad && b < tasks.anchors; ++b) {
    for (int64_t c = 0; c < bank.dim; ++c) {
      double sum = 0;
      for (int64_t p = 0; p < tasks.pieces; ++p) {
        sum += static_cast<const A*>(parts.data_ptr())[(b * tasks.pieces + p) * dim + c];
      }
      grad[b * bank.dim + c] = static_cast<A>(scale * sum);
    }
  }
  double sum = direction.constant * static_cast<double>((tasks.columns - 1) * tasks.anchors);
  for (double x : losses) sum += x;
  return sum;
}

template <class A>
double log_sum(const Tensor& anchors, const Bank& bank, const Tensor& index, double temperature) {
  const Tasks tasks(index);
  const int64_t dim = whole_vectors<A>(bank.dim);
  const double rate = kLog2E / temperature;
  const Tensor padded = padded_anchors<A>(anchors);
  std::vector<LogSum> sums(tasks.count());
  tasks.for_all([&](int64_t task, int64_t b, int64_t begin, int64_t end) {
    const A* anchor = static_cast<const A*>(padded.data_ptr()) + b * dim;
    const int64_t* own = static_cast<const int64_t*>(index.data_ptr()) + b * tasks.columns;
    alignas(64) A dots[kTile];
    for_tiles<A>(bank, own, begin, end, [&](const Tile<A>& tile, int64_t) {
      dot_tile(tile, anchor, dim, bank.bytes, dots);
      for (int64_t r = 0; r < tile.count; ++r) sums[task].add({dots[r] * rate, 1});
    });
  });
  LogSum sum;
  for (const LogSum& x : sums) sum.add(x);
  return sum.nats();
}

// ---- the update of a bank
constexpr int64_t kUpdateGrain = 64;  // rows that are worth a thread

// moved = momentum * old + (1 - momentum) * row -> the sum of its squares.
template <class A>
A mix(const A* old, const A* row, int64_t n, A momentum, A* moved) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    moved[i] = momentum * old[i] + (1 - momentum) * row[i];
    return moved[i] * moved[i];
  });
}

// ---- drawing
constexpr int64_t kDrawPiece = 1024;  // columns of a task

// The first draws of columns [begin, begin + n), in vectors.
void draw_first(const Source& source, int64_t positive, int64_t begin, int64_t n, int64_t* out) {
  const Source own = source;
  const uint64_t row = static_cast<uint64_t>(positive);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t w[4];
    philox(own.key, static_cast<uint32_t>(begin + i), 0, row, w);
    out[i] = own.pick(w);
  }
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void score(const Inputs& in, A* loss, A* student_grad, A* teacher_grad, A* scores) const {
    check_contrast_index(in.index, in.bank_student.size(0));
    const int64_t rows = in.index.size(0), columns = in.index.size(1);
    double sum = nce::score<A>(in.student, Bank(in.bank_teacher), in.index, read<double>(column(in.z_student), 0),
                               in.temperature, student_grad, scores);
    sum += nce::score<A>(in.teacher, Bank(in.bank_student), in.index, read<double>(column(in.z_teacher), 0),
                         in.temperature, teacher_grad, scores ? scores + rows * columns : nullptr);
    *loss = static_cast<A>(sum / std::max<int64_t>(rows, 1));
  }

  // Of the directions whose Z is unset (negative); else 0.
  template <class A>
  void log_sums(const Inputs& in, double* sums) const {
    const bool known[2] = {read<double>(column(in.z_student), 0) >= 0, read<double>(column(in.z_teacher), 0) >= 0};
    sums[0] = sums[1] = 0;
    if (known[0] && known[1]) return;
    check_contrast_index(in.index, in.bank_student.size(0));
    if (!known[0]) sums[0] = log_sum<A>(in.student, Bank(in.bank_teacher), in.index, in.temperature);
    if (!known[1]) sums[1] = log_sum<A>(in.teacher, Bank(in.bank_student), in.index, in.temperature);
  }

  template <class A>
  void update(const Tensor& bank, const Tensor& rows, const Tensor& index, A momentum) const {
    check_index(index, bank.size(0));
    const int64_t n = rows.size(0), dim = bank.size(1);
    const int64_t* at = data<const int64_t>(index);
    std::unordered_map<int64_t, int64_t> last;  // row of the bank -> the last row of the batch for it
    for (int64_t i = 0; i < n; ++i) last[at[i]] = i;
    dispatch_float(bank.scalar_type(), [&](auto bank_tag) {
      using T = decltype(bank_tag);
      for_each(n, kUpdateGrain, [&](int64_t i) {
        if (last.find(at[i])->second != i) return;
        T* to = static_cast<T*>(bank.data_ptr()) + at[i] * dim;
        std::vector<A> old(dim), row(dim), moved(dim);
        widen(to, 1, dim, old.data());
        dispatch_float(rows.scalar_type(), [&](auto row_tag) {
          using R = decltype(row_tag);
          widen(static_cast<const R*>(rows.data_ptr()) + i * rows.stride(0), rows.stride(1), dim, row.data());
        });
        const A norm = std::sqrt(mix(old.data(), row.data(), dim, momentum, moved.data()));
        if (!(norm > 0 && norm < infinity<A>())) return;  // no direction: the row stays
        for (A& x : moved) x /= norm;
        narrow(moved.data(), dim, to);
      });
    });
  }

  void draw(const Tensor& index, Source source, const uint64_t* seed, int64_t columns, int64_t* out) const {
    check_index(index, source.rows);
    source.key = *seed;
    const int64_t rows = index.size(0), k = columns - 1, pieces = (k + kDrawPiece - 1) / kDrawPiece;
    const int64_t* positives = data<const int64_t>(index);
    std::vector<char> none(rows * pieces);
    for_each(rows * pieces, 1, [&](int64_t task) {
      const int64_t b = task / pieces, begin = task % pieces * kDrawPiece, n = std::min(kDrawPiece, k - begin);
      int64_t* row = out + b * (k + 1);
      if (begin == 0) row[0] = positives[b];
      draw_first(source, positives[b], begin, n, row + 1 + begin);
      for (int64_t i = begin; source.labels && i < begin + n; ++i) {
        if (source.labels[row[1 + i]] != source.labels[positives[b]]) continue;
        row[1 + i] = source.draw(positives[b], static_cast<uint32_t>(i));
        none[task] |= row[1 + i] < 0;
      }
    });
    const int64_t failed = std::find(none.begin(), none.end(), 1) - none.begin();
    if (failed < rows * pieces) {
      throw std::invalid_argument("labels has one class only, that of row " +
                                  std::to_string(positives[failed / pieces]) + ": there is no negative to draw");
    }
  }
};

}  // namespace
}  // namespace nce
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::nce::register_ops<kdfast::nce::Cpu>(m); }
