#include "common/logit_rows.h"
#include "divergence/host.h"

namespace kdfast {
namespace divergence {
namespace {

// ---- pieces of a row
template <class A, class F>
KD_INLINED inline Term<A> term_of(const F& terms, const Point<A>& x) {
  const Term<A> t = terms(x);
  const bool nowhere = is_nowhere(x);
  return {nowhere ? A(0) : t.value, nowhere ? A(0) : t.to_p, nowhere ? A(0) : t.to_q};
}

// kMoments: also the sums that the slope in a temperature is made of. kKept: e has the exponentials of the centred
// logits.
template <bool kMoments, bool kKept, class A, class F>
Terms<A> row_sums(const A* z_p, const A* z_q, const A* e_p, const A* e_q, int64_t n, const Sides<A>& sides,
                  const F& terms) {
  return sum_elements<kMoments ? 7 : 3, A>(n, [&](int64_t i) KD_INLINED {
    const Point<A> x = kKept ? sides.at(z_p[i], z_q[i], e_p[i], e_q[i]) : sides.at(z_p[i], z_q[i]);
    const Term<A> t = term_of(terms, x);
    if (!kMoments) return Terms<A>{t.value, t.to_p, t.to_q};
    const A c_p = z_p[i] - sides.p.max, c_q = z_q[i] - sides.q.max;
    return Terms<A>{t.value,
                    t.to_p,
                    t.to_q,
                    t.to_p == 0 ? A(0) : t.to_p * c_p,
                    t.to_q == 0 ? A(0) : t.to_q * c_q,
                    x.p == 0 ? A(0) : x.p * c_p,
                    x.q == 0 ? A(0) : x.q * c_q};
  });
}

template <class A, class F>
Terms<A> row_sums(bool moments, bool kept, const A* z_p, const A* z_q, const A* e_p, const A* e_q, int64_t n,
                  const Sides<A>& sides, const F& terms) {
  if (moments) {
    return kept ? row_sums<true, true>(z_p, z_q, e_p, e_q, n, sides, terms)
                : row_sums<true, false>(z_p, z_q, e_p, e_q, n, sides, terms);
  }
  return kept ? row_sums<false, true>(z_p, z_q, e_p, e_q, n, sides, terms)
              : row_sums<false, false>(z_p, z_q, e_p, e_q, n, sides, terms);
}

template <bool kTeacher, class A, class F>
void grad_piece(const A* z_p, const A* z_q, int64_t n, const Sides<A>& sides, const F& terms, SideGrad<A> g, A* out) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED {
    const Point<A> x = sides.at(z_p[i], z_q[i]);
    const Term<A> t = term_of(terms, x);
    out[i] = kTeacher ? g(t.to_p, x.p, z_p[i]) : g(t.to_q, x.q, z_q[i]);
  });
}

// ---- rows
template <class A>
struct Moments {
  A mean, std;
};

// With the std of n - 1. Values are taken less the first one: a constant row has no std at all.
template <class A>
Moments<A> moments_of(const Row<A>& z, int64_t cols) {
  const A first = z.at(0);
  double sum = 0, square = 0;
  for_pieces(0, cols, [&](int64_t begin, int64_t n) {
    const A* piece = z.piece(begin, n);
    sum += sum_each<A>(n, [&](int64_t i) KD_INLINED { return piece[i] - first; });
  });
  const A mean = static_cast<A>(sum / cols);
  for_pieces(0, cols, [&](int64_t begin, int64_t n) {
    const A* piece = z.piece(begin, n);
    square += sum_each<A>(n, [&](int64_t i) KD_INLINED {
      const A gap = (piece[i] - first) - mean;
      return gap * gap;
    });
  });
  return {first + mean, static_cast<A>(std::sqrt(square / std::max<int64_t>(cols - 1, 1)))};
}

template <class A>
LogSoftmax<A> side_of(const Inputs<A>& in, bool of_teacher, const Row<A>& z, Moments<A>& m, A* e) {
  m = in.standardize ? moments_of(z, in.cols) : Moments<A>{0, 1};
  const A rate = in.rate(of_teacher, z.row, m.std);
  const Softmax<A> side = softmax_sweep<true>(z, in.cols, in.skipped(z.row), rate, e);
  in.stats.set_softmax(of_teacher ? kSide : 0, z.row, side);
  return {side, rate};
}

template <class A>
void write_side(const Inputs<A>& in, bool of_teacher, int64_t row, const SideSums<A>& sums, const Moments<A>& m) {
  const int64_t first = of_teacher ? kSide : 0;
  in.stats[first + kSlope][row] = sums.slope;
  in.stats[first + kMoment][row] = sums.moment;
  in.stats[first + kMean][row] = m.mean;
  in.stats[first + kStd][row] = m.std;
}

template <class A>
void divergence_rows(const Inputs<A>& in, const Form& form, A* values) {
  for_rows(in.rows, in.cols, [&](int64_t row) {
    if (in.is_masked(row)) {
      values[row] = 0;
      return in.stats.clear(kStats, row);
    }
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk];
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    alignas(64) A e_s[kChunk], e_t[kChunk];
    const bool kept = in.cols <= kChunk && in.skipped(row) < 0;  // all exponentials, those of the only piece
    Moments<A> moments_s, moments_t;
    const LogSoftmax<A> q = side_of(in, false, s, moments_s, e_s), p = side_of(in, true, t, moments_t, e_t);
    const Sides<A> sides(p, q);
    RowSums<double> sums{};
    dispatch_form<A>(form.of_row(in, row), [&](auto terms) {
      terms.set_row(-1.0, sides.both());
      for_row_pieces(in.cols, in.skipped(row), [&](int64_t begin, int64_t n) {
        const A *z_s = s.piece(begin, n), *z_t = t.piece(begin, n);
        const Terms<A> piece = row_sums(in.moments, kept, z_t, z_s, e_t, e_s, n, sides, terms);
        sums.value += piece.a;
        sums.g_p += piece.b;
        sums.g_q += piece.c;
        sums.gc_p += piece.d;
        sums.gc_q += piece.e;
        sums.pc_p += piece.f;
        sums.pc_q += piece.g;
      });
    });
    if (sides.is_nan()) sums.value = not_a_number<double>();
    values[row] = static_cast<A>(sums.value);
    const SideSums<A> of_q(sums.value, sums.g_q, sums.gc_q, sums.pc_q),
        of_p(sums.value, sums.g_p, sums.gc_p, sums.pc_p);
    write_side(in, false, row, of_q, moments_s);
    write_side(in, true, row, of_p, moments_t);
  });
}

template <class A>
void divergence_grad_rows(const Inputs<A>& in, const Form& form, A scale, const Gradients& to) {
  for_rows(in.rows, in.cols, [&](int64_t row) {
    const A factor = to.of_row(in, row, scale);
    if (factor == 0) {
      write_zeros<A>(to.student, row, in.cols);
      return write_zeros<A>(to.teacher, row, in.cols);
    }
    alignas(64) A student_buffer[kChunk], teacher_buffer[kChunk], buffer[kChunk];
    const Row<A> s{in.student, row, student_buffer}, t{in.teacher, row, teacher_buffer};
    const Sides<A> sides(in.side(true, row), in.side(false, row));
    const SideGrad<A> g_s = in.grad(false, row, factor), g_t = in.grad(true, row, factor);
    const int64_t skipped = in.skipped(row);
    dispatch_form<A>(form.of_row(in, row), [&](auto terms) {
      terms.set_row(-1.0, sides.both());
      for_row_pieces(in.cols, skipped, [&](int64_t begin, int64_t n) {
        const A *z_s = s.piece(begin, n), *z_t = t.piece(begin, n);
        if (to.student.data) {
          A* out = target(to.student, row, begin, buffer);
          grad_piece<false>(z_t, z_s, n, sides, terms, g_s, out);
          write(to.student, row, begin, n, out);
        }
        if (to.teacher.data) {
          A* out = target(to.teacher, row, begin, buffer);
          grad_piece<true>(z_t, z_s, n, sides, terms, g_t, out);
          write(to.teacher, row, begin, n, out);
        }
      });
    });
    if (skipped >= 0 && to.student.data) write_one(to.student, row, skipped, A(0));
    if (skipped >= 0 && to.teacher.data) write_one(to.teacher, row, skipped, A(0));
  });
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void divergence(const Inputs<A>& in, const Form& form, A* values) const {
    check_labels(in.labels, in.rows, in.cols);
    divergence_rows(in, form, values);
  }

  template <class A>
  void divergence_backward(const Inputs<A>& in, const Form& form, A scale, const Gradients& to) const {
    divergence_grad_rows(in, form, scale, to);
  }

  template <class A, class Value>
  void reduce(const Value& value, int64_t rows, bool sum, const Tensor&, A* out) const {
    reduce_rows(rows, sum, out, value);
  }
};

}  // namespace
}  // namespace divergence
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::divergence::register_ops<kdfast::divergence::Cpu>(m); }
