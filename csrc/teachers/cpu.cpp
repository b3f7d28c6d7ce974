#include <algorithm>
#include <memory>

#include "common/logit_rows.h"
#include "teachers/host.h"

namespace kdfast {
namespace teachers {
namespace {

// ---- pieces of a row
template <class A>
struct TeacherSums {
  A sum, dot;
};

// A teacher beside the student, its exponentials kept if kKeep. Without kMasked no logit may be masked; else `dot` is
// not finite.
template <bool kCross, bool kKeep, bool kMasked, class A>
TeacherSums<A> teacher_sums(const A* z, const A* student, int64_t n, A max_p, A max_q, A rate, A* powers) {
  const auto sums = sum_elements<2, A>(n, [&](int64_t i) KD_INLINED {
    const A c_p = z[i] - max_p, c_q = student[i] - max_q, e = exp2(c_p * rate);
    if (kKeep) powers[i] = e;
    return Terms<A>{e, kMasked ? divergence_term(e, c_p, c_q, kCross) : e * (kCross ? -c_q : c_p - c_q)};
  });
  return {sums.a, sums.b};
}

// sum += factor e
template <class A>
void add_scaled(const A* e, int64_t n, A factor, A* sum) {
  update_elements(sum, n, [&](int64_t i, A old) KD_INLINED { return old + factor * e[i]; });
}

// Flushes the sums of a few rows into the sums of all rows, which are overwritten without kAdd.
template <bool kAdd, class A>
void flush_sums(A* few, int64_t n, double* all) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    all[i] = (kAdd ? all[i] : 0.0) + static_cast<double>(few[i]);
    few[i] = 0;
  }
}

double dot_product(const double* x, const double* y, int64_t n) {
  return sum_each<double>(n, [&](int64_t i) KD_INLINED { return x[i] * y[i]; });
}

// Up to four teachers in a piece of a row: logits, maxima, and the factors of their exponentials.
template <class A>
struct TeacherTerms {
  const A* z[4];
  A max[4], factor[4];
};

// out = of_q exp2(c rate) + of_1 exp(c), or what it holds if kAdd, less the terms of kM teachers.
template <int kT, int kM, bool kAdd, class A>
void student_grad_piece(const A* z, TeacherTerms<A> p, int64_t n, A max, A rate, A of_q, A of_1, A* out) {
  const A *z_0 = p.z[0], *z_1 = p.z[1], *z_2 = p.z[2], *z_3 = p.z[3];
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED {
    const A c = z[i] - max, e = exp2(c * rate);
    A sum = kAdd ? old : of_q * e + of_1 * exp_1<kT>(e, c);
    if (kM > 0) sum -= p.factor[0] * exp2((z_0[i] - p.max[0]) * rate);
    if (kM > 1) sum -= p.factor[1] * exp2((z_1[i] - p.max[1]) * rate);
    if (kM > 2) sum -= p.factor[2] * exp2((z_2[i] - p.max[2]) * rate);
    if (kM > 3) sum -= p.factor[3] * exp2((z_3[i] - p.max[3]) * rate);
    return sum;
  });
}

template <bool kCross, class A>
void teacher_grad_piece(const A* z, const A* student, int64_t n, LogSoftmax<A> p, LogSoftmax<A> q, A divergence,
                        A scale, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A c = (z[i] - p.max) * p.rate;
    out[i] = teacher_term(exp2(c) * p.inverse, c - p.log2_sum, (student[i] - q.max) * q.rate - q.log2_sum, divergence,
                          scale, kCross);
  });
}

// top = max(top, log2 p)
template <class A>
void max_log_probs(const A* z, int64_t n, LogSoftmax<A> p, A* top) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const A log_p = p(z[i]);
    top[i] = log_p > top[i] ? log_p : top[i];
  });
}

// sum += p / 2^top
template <class A>
void add_probs(const A* z, int64_t n, LogSoftmax<A> p, const A* top, A* sum) {
  update_elements(sum, n, [&](int64_t i, A old) KD_INLINED {
    const A log_p = p(z[i]);
    return old + exp2(log_p - (is_masked(top[i]) ? A(0) : top[i]));
  });
}

template <class A>
A reverse_sum(const A* z, int64_t n, LogSoftmax<A> q, const A* top, const A* sum, A count) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A log_q = q(z[i]);
    return reverse_term(exp2(log_q), log_q, mean_log(top[i], sum[i], count));
  });
}

template <class A>
A near_reverse_sum(const A* z, int64_t n, LogSoftmax<A> q, const A* top, const A* sum, A count) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A log_q = q(z[i]);
    return near_reverse_term(exp2(log_q), log_q, mean_log(top[i], sum[i], count));
  });
}

template <class A>
void reverse_grad_piece(const A* z, int64_t n, LogSoftmax<A> q, const A* top, const A* sum, A count, A kl, A scale,
                        A* out) {
  update_elements(out, n, [&](int64_t i, A old) KD_INLINED {
    const A log_q = q(z[i]);
    return old + reverse_grad(exp2(log_q), log_q, mean_log(top[i], sum[i], count), kl, scale);
  });
}

// ---- rows

// The student and its teachers in a piece of a row; pieces 0 to M of the scratch.
template <class A>
const A* read_all(const Teachers<A>& op, int64_t row, int64_t begin, int64_t n, const Scratch<A>& scratch,
                  NetworkPieces<A>& pieces) {
  pieces.read(op.teachers, row, begin, n, scratch, 1);
  return read<A>(op.student, row, begin, n, scratch.piece(0));
}

// Sums over a piece; with masks only where a logit is masked.
template <bool kKeep, class A>
TeacherSums<A> all_teacher_sums(bool cross, const A* z, const A* student, int64_t n, A max_p, A max_q, A rate,
                                A* powers) {
  const auto unmasked = cross ? teacher_sums<true, kKeep, false, A> : teacher_sums<false, kKeep, false, A>;
  const TeacherSums<A> sums = unmasked(z, student, n, max_p, max_q, rate, powers);
  if (sums.dot - sums.dot == 0) return sums;
  const auto masked = cross ? teacher_sums<true, kKeep, true, A> : teacher_sums<false, kKeep, true, A>;
  return masked(z, student, n, max_p, max_q, rate, powers);
}

// log2 of the teachers' mean probabilities in a piece as its largest logarithm and a sum, see mean_log.
template <class A>
void mean_pieces(const Teachers<A>& op, int64_t row, const NetworkPieces<A>& pieces, int64_t n, A* top, A* sum) {
  std::fill(top, top + n, -infinity<A>());
  std::fill(sum, sum + n, A(0));
  for (int64_t m = 0; m < op.teachers.count; ++m) {
    max_log_probs(pieces.z[m], n, LogSoftmax<A>(op.stats.teacher(m, row), op.rate()), top);
  }
  for (int64_t m = 0; m < op.teachers.count; ++m) {
    add_probs(pieces.z[m], n, LogSoftmax<A>(op.stats.teacher(m, row), op.rate()), top, sum);
  }
}

// ---- forward

// One row: its statistics and cross-entropy, in sweeps over its pieces. kKeep: the exponentials of its last piece stay
// in pieces M + 1 to 2 M + 1 of the scratch, the student's first.
template <int kT, bool kKeep, class A>
class ForwardRow {
 public:
  ForwardRow(const Teachers<A>& op, int64_t row, const Scratch<A>& scratch)
      : op_(op), row_(row), count_(op.teachers.count), rate_(op.rate()), scratch_(scratch) {}

  static int64_t scratch_pieces(const Teachers<A>& op) { return 2 * op.teachers.count + 2; }

  void find_maxima() {
    std::fill(max_p_, max_p_ + count_, -infinity<A>());
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      read(begin, n);
      max_q_ = max_of(z_, n, max_q_);
      for (int64_t m = 0; m < count_; ++m) max_p_[m] = max_of(pieces_.z[m], n, max_p_[m]);
    });
    max_q_ = finite_max(max_q_);
  }

  void sum_exponentials() {
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      read(begin, n);
      prefetch<A>(op_.student, row_ + 1, op_.rows, op_.cols);
      const ExponentialSums<A> sums = exponential_sums<kT, kKeep>(z_, n, max_q_, rate_, scratch_.piece(count_ + 1));
      sum_q_ += sums.at_t;
      sum_1_ += sums.at_1;
      for (int64_t m = 0; m < count_; ++m) {
        prefetch<A>(op_.teachers[m], row_ + 1, op_.rows, op_.cols);
        const TeacherSums<A> teacher = all_teacher_sums<kKeep>(
            op_.is_cross(), pieces_.z[m], z_, n, finite_max(max_p_[m]), max_q_, rate_, scratch_.piece(count_ + 2 + m));
        sum_p_[m] += teacher.sum;
        dot_[m] += teacher.dot;
      }
    });
    op_.stats.set_student(row_, {max_q_, static_cast<A>(sum_q_)}, static_cast<A>(sum_1_));
    for (int64_t m = 0; m < count_; ++m) {
      op_.stats.set_teacher(m, row_, {finite_max(max_p_[m]), static_cast<A>(sum_p_[m])});
    }
  }

  void find_divergences() {
    for (int64_t m = 0; m < count_; ++m) {
      op_.stats.value(m, row_) = op_.is_reverse() ? A(0) : static_cast<A>(teacher_divergence(m));
    }
    if (op_.is_reverse()) op_.stats.value(0, row_) = static_cast<A>(reverse_divergence());
  }

  A ce() const {
    if (!op_.labels.index) return 0;
    const A at_label = read_one<A>(op_.student, row_, op_.labels.at(row_)) - max_q_;
    return static_cast<A>(cross_entropy<double>(sum_1_, at_label));
  }

 private:
  // A row of one piece is read once.
  void read(int64_t begin, int64_t n) {
    if (has_read_ && op_.cols <= kChunk) return;
    z_ = read_all(op_, row_, begin, n, scratch_, pieces_);
    has_read_ = true;
  }

  double teacher_divergence(int64_t m) {
    double value = kl_of_sums<double>(sum_p_[m], sum_q_, dot_[m], static_cast<double>(rate_), op_.is_cross());
    if (op_.kind != Kind::kKl || !(value < kNear) || !(sum_p_[m] > 0)) return value;
    const NearRow<A> near(finite_max(max_p_[m]), max_q_, sum_p_[m], sum_q_, rate_, true);
    value = 0;
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      read(begin, n);
      value += near_sum(pieces_.z[m], z_, n, near);
    });
    return value;
  }

  double reverse_divergence() {
    const double kl = sum_reverse(reverse_sum<A>, kLn2);
    return kl < kNear && sum_q_ > 0 ? sum_reverse(near_reverse_sum<A>, 1) : kl;
  }

  // scale * f of the pieces, summed over the row.
  template <class F>
  double sum_reverse(const F& f, double scale) {
    A *top = scratch_.piece(count_ + 1), *sum = scratch_.piece(count_ + 2);
    const LogSoftmax<A> log_q(op_.stats.student(row_), rate_);
    double total = 0;
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      read(begin, n);
      mean_pieces(op_, row_, pieces_, n, top, sum);
      total += scale * f(z_, n, log_q, top, sum, static_cast<A>(count_));
    });
    return total;
  }

  const Teachers<A>& op_;
  int64_t row_, count_;
  A rate_;
  const Scratch<A>& scratch_;
  NetworkPieces<A> pieces_;
  const A* z_ = nullptr;  // of the student
  bool has_read_ = false;
  A max_q_ = -infinity<A>(), max_p_[kMaxNetworks];
  double sum_q_ = 0, sum_1_ = 0, sum_p_[kMaxNetworks] = {}, dot_[kMaxNetworks] = {};
};

// -> the cross-entropy of the row.
template <int kT, bool kKeep, class A>
A forward_row(const Teachers<A>& op, int64_t row, const Scratch<A>& scratch) {
  ForwardRow<kT, kKeep, A> state(op, row, scratch);
  state.find_maxima();
  state.sum_exponentials();
  state.find_divergences();
  return state.ce();
}

// ---- backward
template <class A>
struct Backward {
  const Teachers<A>& op;
  A kl, ce;  // upstream gradients of the divergence and the cross-entropy
  Matrix to_student;
  NetworkGrads to_teachers;

  static int64_t scratch_pieces(const Teachers<A>& op) { return op.teachers.count + 4; }

  template <int kT>
  void row(int64_t row, const Scratch<A>& scratch) const {
    const LogSoftmax<A> q(op.stats.student(row), op.rate());
    const Row<kT> state{*this, row, q, op.labels.index ? cross_entropy_coef(ce, op.stats.sum_1(row)) : A(0), scratch};
    // A teacher without weight adds 0 whatever it is.
    int64_t active[kMaxNetworks], n_active = 0;
    A of_q = 0;
    for (int64_t m = 0; !op.is_reverse() && m < op.teachers.count; ++m) {
      const A scale = kl * op.weight_of(m);
      if (scale == 0) continue;
      active[n_active++] = m;
      of_q += op.stats.teacher(m, row).sum == 0 ? A(0) : scale * q.inverse;
    }
    NetworkPieces<A> pieces;
    for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
      const A* z = read_all(op, row, begin, n, scratch, pieces);
      if (to_student.data) state.write_student(z, pieces, begin, n, active, n_active, of_q);
      for (int64_t m = 0; m < to_teachers.count; ++m) state.write_teacher(m, z, pieces.z[m], begin, n);
    });
  }

 private:
  template <int kT>
  struct Row {
    const Backward& b;
    int64_t row;
    LogSoftmax<A> q;
    A coef_1;  // of exp(z - max) in the gradient of the cross-entropy
    const Scratch<A>& scratch;

    A* buffer() const { return scratch.piece(b.op.teachers.count + 3); }

    void write_student(const A* z, const NetworkPieces<A>& pieces, int64_t begin, int64_t n, const int64_t* active,
                       int64_t n_active, A of_q) const {
      A* out = target(b.to_student, row, begin, buffer());
      if (n_active == 0 && coef_1 == 0) {
        std::fill(out, out + n, A(0));
      } else if (n_active == 0) {
        student_grad_piece<kT, 0, false>(z, TeacherTerms<A>{}, n, q.max, q.rate, of_q, coef_1, out);
      }
      if (b.op.is_reverse() && b.kl != 0) {
        add_reverse(z, pieces, n, out);
      } else {
        for_some<4>(0, n_active, [&](int64_t first, auto some) {
          TeacherTerms<A> terms{};
          for (int64_t i = 0; i < some.value; ++i) {
            const int64_t m = active[first + i];
            const Softmax<A> p = b.op.stats.teacher(m, row);
            terms.z[i] = pieces.z[m];
            terms.max[i] = p.max;
            terms.factor[i] = b.kl * b.op.weight_of(m) * p.inverse();
          }
          const auto piece =
              first ? student_grad_piece<kT, some.value, true, A> : student_grad_piece<kT, some.value, false, A>;
          piece(z, terms, n, q.max, q.rate, of_q, coef_1, out);
        });
      }
      const int64_t at = b.op.labels.index ? b.op.labels.at(row) - begin : -1;
      if (at >= 0 && at < n) out[at] -= b.ce;
      write(b.to_student, row, begin, n, out);
    }

    void add_reverse(const A* z, const NetworkPieces<A>& pieces, int64_t n, A* out) const {
      const int64_t count = b.op.teachers.count;
      A *top = scratch.piece(count + 1), *sum = scratch.piece(count + 2);
      mean_pieces(b.op, row, pieces, n, top, sum);
      reverse_grad_piece(z, n, q, top, sum, static_cast<A>(count), A(kLog2E) * b.op.stats.value(0, row), A(kLn2) * b.kl,
                         out);
    }

    void write_teacher(int64_t m, const A* student, const A* teacher, int64_t begin, int64_t n) const {
      const Matrix to = b.to_teachers[m];
      A* out = target(to, row, begin, buffer());
      const A value = b.op.stats.value(m, row);
      const LogSoftmax<A> p(b.op.stats.teacher(m, row), q.rate);
      const A scale = value == infinity<A>() ? A(0) : A(kLn2) * b.kl * b.op.weight_of(m);
      if (scale == 0) {
        std::fill(out, out + n, A(0));
      } else {
        const auto piece = b.op.is_cross() ? teacher_grad_piece<true, A> : teacher_grad_piece<false, A>;
        piece(teacher, student, n, p, q, A(kLog2E) * value, scale, out);
      }
      write(to, row, begin, n, out);
    }
  };
};

// ---- aekd
// Rows are summed in blocks by one thread each, so that no sum depends on the number of threads: at most kBlocks of
// them, and of at least kBlockRows rows.
constexpr int64_t kBlocks = 16, kBlockRows = 32;
constexpr int64_t kFew = 16;  // rows that are summed in the type of the logits, before they are flushed to float64

// The probabilities of each network, summed over the rows [first, end): sums [1 + M, cols], the student's first.
template <class A>
void sum_probabilities(const Teachers<A>& op, int64_t first, int64_t end, double* sums) {
  const int64_t count = op.teachers.count, size = (count + 1) * op.cols;
  const Scratch<A> scratch(ForwardRow<1, true, A>::scratch_pieces(op));
  std::vector<A> few(size, A(0));
  for (int64_t row = first; row < end; ++row) {
    forward_row<1, true>(op, row, scratch);
    NetworkPieces<A> pieces;
    for_pieces(0, op.cols, [&](int64_t begin, int64_t n) {
      const A* z = op.cols > kChunk ? read_all(op, row, begin, n, scratch, pieces) : nullptr;
      for (int64_t i = 0; i <= count; ++i) {
        const Softmax<A> network = i ? op.stats.teacher(i - 1, row) : op.stats.student(row);
        A* e = scratch.piece(count + 1 + i);
        if (z) write_exponentials(i ? pieces.z[i - 1] : z, n, network.max, op.rate(), e);
        add_scaled(e, n, network.inverse(), few.data() + i * op.cols + begin);
      }
    });
    if ((row - first) % kFew == kFew - 1 || row + 1 == end) {
      const auto flush = row - first < kFew ? flush_sums<false, A> : flush_sums<true, A>;
      flush(few.data(), size, sums);
    }
  }
}

// The Gram matrix of the teachers' gradients sum_b (q - p_m); on the way, the statistics of the rows.
template <class A>
std::vector<double> gradient_gram(const Teachers<A>& op) {
  const int64_t count = op.teachers.count, cols = op.cols, size = (count + 1) * cols;
  const int64_t per_block = std::max<int64_t>(kBlockRows, (op.rows + kBlocks - 1) / kBlocks);
  const int64_t blocks = (op.rows + per_block - 1) / per_block;
  const std::unique_ptr<double[]> sums(new double[std::max<int64_t>(blocks, 1) * size]);
  for_each(blocks, 1, [&](int64_t block) {
    const int64_t first = block * per_block;
    sum_probabilities(op, first, std::min(op.rows, first + per_block), sums.get() + block * size);
  });
  for_each((size + kChunk - 1) / kChunk, 4, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(size, begin + kChunk);
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[block * size + i];
    }
  });
  std::vector<double> gram(count * count, 0.0);
  if (blocks == 0) return gram;
  for (int64_t m = 1; m <= count; ++m) {
    for (int64_t c = 0; c < cols; ++c) sums[m * cols + c] = sums[c] - sums[m * cols + c];
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      gram[i * count + j] = gram[j * count + i] =
          dot_product(sums.get() + (i + 1) * cols, sums.get() + (j + 1) * cols, cols);
    }
  }
  return gram;
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void forward(const Teachers<A>& op, const Scales& scales, const Tensor& loss) const {
    check_labels(op.labels, op.rows, op.cols);
    std::vector<A> losses(op.rows);
    const double t = op.temperature.exact(0);
    const A kl = static_cast<A>(scales.kl * t * t), ce = static_cast<A>(scales.ce());
    dispatch_temperature<1, 2, 3, 4>(op.rate(), [&](auto t_1) {
      constexpr int kT = decltype(t_1)::value;
      const int64_t pieces = ForwardRow<kT, false, A>::scratch_pieces(op);
      for_rows<A>(op.rows, op.cols, op.teachers.count + 1, pieces, [&](int64_t row, const Scratch<A>& scratch) {
        const A row_ce = forward_row<kT, false>(op, row, scratch);
        losses[row] = weighted(kl, op.stats.divergence(op.weight, op.is_reverse(), row)) + weighted(ce, row_ce);
      });
    });
    reduce_rows(op.rows, true, data<A>(loss), [&](int64_t row) { return losses[row]; });
  }

  template <class A>
  void backward(const Teachers<A>& op, const Column& grad, const Scales& scales, const Matrix& to_student,
                const NetworkGrads& to_teachers) const {
    const double upstream = read<double>(grad, 0);
    const Backward<A> b{op, static_cast<A>(upstream * (scales.kl * op.temperature.exact(0))),
                        static_cast<A>(upstream * scales.ce_scale / scales.ce_divisor), to_student, to_teachers};
    dispatch_temperature<1, 2, 3, 4>(op.rate(), [&](auto t_1) {
      for_rows<A>(op.rows, op.cols, op.teachers.count + 1, Backward<A>::scratch_pieces(op),
                  [&](int64_t row, const Scratch<A>& scratch) { b.template row<t_1.value>(row, scratch); });
    });
  }

  template <class A>
  void aekd(const Teachers<A>& op, double scale, double slack, bool normalize, A* weights, const Tensor& loss) const {
    const int64_t count = op.teachers.count;
    std::vector<double> gram = gradient_gram(op), memory(simplex_memory(count)), lengths(count), exact(count);
    aekd_weights(gram.data(), count, slack, normalize, memory.data(), lengths.data(), exact.data());
    for (int64_t m = 0; m < count; ++m) weights[m] = static_cast<A>(exact[m]);
    const double t = op.temperature.exact(0);
    const A kl = static_cast<A>(scale * t * t);
    reduce_rows(op.rows, true, data<A>(loss),
                [&](int64_t row) { return weighted(kl, op.stats.divergence(op.weight, false, row)); });
  }

  void simplex_minimum(const Matrix& gram, const Column& slope, int64_t count, double cap, double* memory,
                       double* a) const {
    read_and_solve(gram, slope, count, cap, memory, a);
  }
};

}  // namespace
}  // namespace teachers
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::teachers::register_ops<kdfast::teachers::Cpu>(m); }
