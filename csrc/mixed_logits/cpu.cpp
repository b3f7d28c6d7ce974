#include <algorithm>

#include "common/logit_rows.h"
#include "mixed_logits/host.h"
#include "mixed_logits/pieces.h"

namespace kdfast {
namespace mixed_logits {
namespace {

// ---- targets

// Each learner has a target, whose softmax is needed at T alone.
template <class A>
bool has_own_targets(const MixedLogits<A>& op) {
  return op.targets == op.learners && !op.target_ce;
}

// Writes the logits of targets r to r + kR in a piece of the row, and the largest of each to `top`. They have to be
// mixed of the same networks; -> whether they are.
template <int kR, class A>
bool mix_targets(const MixedLogits<A>& op, int64_t row, int64_t r, const NetworkPieces<A>& pieces, int64_t n,
                 A* const* out, A* top) {
  const A* z[kMaxNetworks];
  A max[kMaxNetworks], w[kR * kMaxNetworks];
  int64_t count = 0;
  for (int64_t m = 0; m < op.networks.count; ++m) {
    int zeros = 0;
    for (int i = 0; i < kR; ++i) {
      const A weight = w[i * kMaxNetworks + count] = op.weight(row, r + i, m);
      zeros += weight == 0;
    }
    if (zeros == kR) continue;  // adds nothing, also where it is masked
    if (zeros) return false;
    z[count] = pieces.z[m];
    max[count++] = op.stats.max(m, row);
  }
  for (int i = 0; i < kR && count == 0; ++i) {
    std::fill(out[i], out[i] + n, A(0));
    top[i] = 0;
  }
  for_some<4>(0, count, [&](int64_t first, auto some) {
    if (first == 0) {
      const Terms<A> tops = mix_pieces<some.value, kR>(z, max, w, n, out);
      const A all[] = {tops.a, tops.b, tops.c, tops.d};
      std::copy(all, all + kR, top);
    } else {
      for (int i = 0; i < kR; ++i) {
        add_mixed<some.value>(z + first, max + first, w + i * kMaxNetworks + first, n, out[i]);
        if (first + some.value == count) top[i] = max_of(out[i], n, -infinity<A>());
      }
    }
  });
  return true;
}

// The logits of the one target that takes the least of each class; -> the largest.
template <class A>
A least_target(const MixedLogits<A>& op, int64_t row, const NetworkPieces<A>& pieces, int64_t n, A* out) {
  A origin[kMaxNetworks];
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A at_label = read_one<A>(op.networks[m], row, op.labels.at(row));
    origin[m] = is_masked(at_label) ? op.stats.max(m, row) : at_label;
  }
  min_piece(pieces.z, origin, op.networks.count, n, out);
  return max_of(out, n, -infinity<A>());
}

// Writes the logits of all targets in a piece of the row to pieces of the scratch from `first` on, and the largest of
// each to `top`.
template <class A>
void target_pieces(const MixedLogits<A>& op, int64_t row, const NetworkPieces<A>& pieces, int64_t n,
                   const Scratch<A>& scratch, int64_t first, A* top) {
  if (!op.mix.data) {
    *top = least_target(op, row, pieces, n, scratch.piece(first));
    return;
  }
  for_some<4>(0, op.targets, [&](int64_t r, auto some) {
    A* out[some.value];
    for (int i = 0; i < some.value; ++i) out[i] = scratch.piece(first + r + i);
    if (mix_targets<some.value>(op, row, r, pieces, n, out, top + r)) return;
    for (int i = 0; i < some.value; ++i) mix_targets<1>(op, row, r + i, pieces, n, out + i, top + r + i);
  });
}

// The logit of one class of a target.
template <class A>
A target_at(const MixedLogits<A>& op, int64_t row, int64_t r, int64_t col) {
  A t = 0;
  for (int64_t m = 0; m < op.networks.count; ++m) {
    const A w = op.weight(row, r, m);
    if (w != 0) t += w * (read_one<A>(op.networks[m], row, col) - op.stats.max(m, row));
  }
  return t;
}

// ---- forward
struct TargetState {
  double sum = 0, sum_1 = 0;
  SmoothedTargetSums<double> smoothed;
};

struct LearnerState {
  double sum = 0, sum_1 = 0, kl = 0;
  bool near = false;
  CrossSums<double> cross;
};

template <class A>
struct RowLoss {
  A kl, ce;
};

// One row: its statistics and loss, in sweeps over its pieces.
template <int kT, bool kEps, class A>
class ForwardRow {
 public:
  ForwardRow(const MixedLogits<A>& op, int64_t row, const Scratch<A>& scratch)
      : op_(op),
        stats_(op.stats),
        row_(row),
        rate_(op.rate()),
        scratch_(scratch),
        e_t_(scratch.piece(op.networks.count + op.targets)),
        targets_(op.targets),
        learners_(op.learners) {}

  static int64_t scratch_pieces(const MixedLogits<A>& op) { return op.networks.count + op.targets + 1; }

  void find_maxima() {
    for (int64_t m = 0; m < op_.networks.count; ++m) stats_.max(m, row_) = -infinity<A>();
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      read(begin, n);
      for (int64_t m = 0; m < op_.networks.count; ++m) {
        stats_.max(m, row_) = max_of(pieces_.z[m], n, stats_.max(m, row_));
      }
    });
    for (int64_t m = 0; m < op_.networks.count; ++m) stats_.max(m, row_) = finite_max(stats_.max(m, row_));

    for (int64_t r = 0; r < op_.targets; ++r) stats_.target_max(r, row_) = -infinity<A>();
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      mix(begin, n);
      for (int64_t r = 0; r < op_.targets; ++r) stats_.target_max(r, row_) = max(stats_.target_max(r, row_), top_[r]);
    });
    for (int64_t r = 0; r < op_.targets; ++r) stats_.target_max(r, row_) = finite_max(stats_.target_max(r, row_));
  }

  void sum_exponentials() {
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      mix(begin, n);
      for (int64_t i = 0; i < op_.learners; ++i) {
        prefetch<A>(op_.networks[i], row_ + 1, op_.rows, op_.cols);
        add_learner(i, n);
        // A target's sum is complete after its first learner, if the row has one piece.
        if (kEps && is_first_learner(i) && op_.cols <= kChunk) add_smoothed(op_.target_of(i), n);
      }
    });
    if (kEps && op_.cols > kChunk) {
      for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
        mix(begin, n);
        for (int64_t r = 0; r < op_.targets; ++r) {
          write_exponentials(target(r), n, stats_.target_max(r, row_), rate_, e_t_);
          add_smoothed(r, n);
        }
      });
    }
    for (int64_t r = 0; r < op_.targets; ++r) {
      stats_.target_sum(r, row_) = static_cast<A>(targets_[r].sum);
      stats_.target_sum_1(r, row_) = static_cast<A>(targets_[r].sum_1);
    }
  }

  void find_divergences() {
    bool any_near = false;
    for (int64_t i = 0; i < op_.learners; ++i) {
      LearnerState& learner = learners_[i];
      const double sum_t = targets_[op_.target_of(i)].sum;
      learner.kl = kl_of_sums<double>(sum_t, learner.sum, learner.cross.dot, rate_);
      learner.near = learner.kl < kNear && sum_t > 0;
      if (learner.near) learner.kl = 0;
      any_near |= learner.near;
    }
    if (!any_near) return;
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      mix(begin, n);
      for (int64_t i = 0; i < op_.learners; ++i) {
        if (!learners_[i].near) continue;
        const int64_t r = op_.target_of(i);
        const NearRow<A> near(stats_.target_max(r, row_), stats_.max(i, row_), targets_[r].sum, learners_[i].sum, rate_,
                              false);
        learners_[i].kl += near_sum(target(r), pieces_.z[i], n, near);
      }
    });
  }

  RowLoss<A> loss() {
    RowLoss<A> loss{0, 0};
    for (int64_t i = 0; i < op_.learners; ++i) {
      const LearnerState& learner = learners_[i];
      const TargetState& target = targets_[op_.target_of(i)];
      const EpsKl<double> kl =
          eps_kl<double>(learner.kl, target.sum, learner.sum, target.smoothed, learner.cross, rate_, op_.eps);
      stats_.sum(i, row_) = static_cast<A>(learner.sum);
      stats_.sum_1(i, row_) = static_cast<A>(learner.sum_1);
      stats_.mass(i, row_) = static_cast<A>(kl.mass);
      stats_.slope(i, row_) = static_cast<A>(kl.slope);
      loss.kl += static_cast<A>(kl.value);
    }
    if (!op_.labels.index) return loss;
    const int64_t label = op_.labels.at(row_);
    for (int64_t i = 0; i < op_.learners; ++i) {
      const A at_label = read_one<A>(op_.networks[i], row_, label) - stats_.max(i, row_);
      loss.ce += static_cast<A>(cross_entropy<double>(learners_[i].sum_1, at_label));
    }
    for (int64_t r = 0; op_.target_ce && r < op_.targets; ++r) {
      const A at_label = target_at(op_, row_, r, label) - stats_.target_max(r, row_);
      loss.ce += static_cast<A>(cross_entropy<double>(targets_[r].sum_1, at_label));
    }
    return loss;
  }

 private:
  // A row of one piece is read and mixed once.
  void read(int64_t begin, int64_t n) {
    if (has_read_ && op_.cols <= kChunk) return;
    pieces_.read(op_.networks, row_, begin, n, scratch_, 0);
    has_read_ = true;
  }

  void mix(int64_t begin, int64_t n) {
    if (has_mixed_ && op_.cols <= kChunk) return;
    read(begin, n);
    target_pieces(op_, row_, pieces_, n, scratch_, op_.networks.count, top_);
    has_mixed_ = true;
  }

  const A* target(int64_t r) const { return scratch_.piece(op_.networks.count + r); }
  bool is_first_learner(int64_t i) const { return i == op_.target_of(i); }

  // A piece's sums of learner i, and those of its target if this is the target's first learner.
  void add_learner(int64_t i, int64_t n) {
    const int64_t r = op_.target_of(i);
    const A *z = pieces_.z[i], *t = target(r), max_q = stats_.max(i, row_), max_t = stats_.target_max(r, row_);
    LearnerSums<A> sums;
    if (has_own_targets(op_)) {
      const OwnSums<A> both = own_sums<kT>(z, t, e_t_, n, max_q, max_t, rate_);
      sums = both.learner;
      targets_[r].sum += both.target;
    } else {
      if (is_first_learner(i)) {
        const ExponentialSums<A> of_target = exponential_sums<kT, true>(t, n, max_t, rate_, e_t_);
        targets_[r].sum += of_target.at_t;
        targets_[r].sum_1 += of_target.at_1;
      }
      sums = learner_sums<kT, kEps, false>(z, t, e_t_, n, max_q, max_t, rate_);
    }
    if (sums.has_masked()) sums = learner_sums<kT, kEps, true>(z, t, e_t_, n, max_q, max_t, rate_);
    learners_[i].sum += sums.sum;
    learners_[i].sum_1 += sums.sum_1;
    learners_[i].cross.dot += sums.dot;
    learners_[i].cross.sum_c += sums.sum_c;
    learners_[i].cross.n_masked_in_target += sums.n_masked_in_target;
  }

  // A piece's sums of the smoothed target r, whose sum is complete and whose exponentials are in e_t.
  void add_smoothed(int64_t r, int64_t n) {
    const Softmax<A> side{stats_.target_max(r, row_), static_cast<A>(targets_[r].sum)};
    const LogSoftmax<A> log_p(side, rate_);
    SmoothedTargetSums<A> sums = smoothed_sums<false>(target(r), e_t_, n, log_p, op_.eps);
    if (!(sums.kl_to_smoothed - sums.kl_to_smoothed == 0)) {
      sums = smoothed_sums<true>(target(r), e_t_, n, log_p, op_.eps);
    }
    targets_[r].smoothed.kl_to_smoothed += sums.kl_to_smoothed;
    targets_[r].smoothed.sum_log += sums.sum_log;
    targets_[r].smoothed.n_active += sums.n_active;
  }

  const MixedLogits<A>& op_;
  const Stats<A>& stats_;
  int64_t row_;
  A rate_;
  const Scratch<A>& scratch_;  // networks, targets, e_t
  A* e_t_;                     // exponentials of the target in use
  std::vector<TargetState> targets_;
  std::vector<LearnerState> learners_;
  NetworkPieces<A> pieces_;
  A top_[kMaxNetworks];
  bool has_read_ = false, has_mixed_ = false;
};

template <int kT, bool kEps, class A>
RowLoss<A> forward_row(const MixedLogits<A>& op, int64_t row, const Scratch<A>& scratch) {
  ForwardRow<kT, kEps, A> state(op, row, scratch);
  state.find_maxima();
  state.sum_exponentials();
  state.find_divergences();
  return state.loss();
}

// ---- backward

// Upstream gradients of the divergences over T, and of the cross-entropies.
template <class A>
struct Upstream {
  A kl, ce;
};

template <class A>
class BackwardRow {
 public:
  BackwardRow(const MixedLogits<A>& op, const Gradients& to, Upstream<A> upstream, int64_t row,
              const Scratch<A>& scratch)
      : op_(op),
        to_(to),
        upstream_(upstream),
        row_(row),
        rate_(op.rate()),
        scratch_(scratch),
        e_t_(scratch.piece(op.networks.count * 2 + op.targets * 2 + 2)),
        mix_dots_(to.mix.data ? op.networks.count * op.targets : 0, 0.0) {}

  static int64_t scratch_pieces(const MixedLogits<A>& op) { return 2 * op.networks.count + 2 * op.targets + 3; }

  template <int kT>
  void write() {
    if (upstream_.kl == 0 && upstream_.ce == 0) return write_zeros();
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) { write_piece<kT>(begin, n); });
    for (int64_t m = 0; m < to_.mix.networks; ++m) {
      for (int64_t r = 0; r < to_.mix.targets; ++r) {
        to_.mix.put(row_, r, m, static_cast<A>(mix_dots_[m * op_.targets + r]));
      }
    }
  }

 private:
  // Pieces of the scratch: networks, targets, gradients of the targets, of the networks, two spare ones, e_t.
  A* target(int64_t r) const { return scratch_.piece(op_.networks.count + r); }
  A* target_grad(int64_t r) const { return scratch_.piece(op_.networks.count + op_.targets + r); }
  A* network_grad(int64_t m) const { return scratch_.piece(op_.networks.count + 2 * op_.targets + m); }
  A* spare(int64_t i) const { return network_grad(op_.networks.count + i); }

  // Only learner m contributes to its target's gradient, which is written instead of accumulated.
  bool is_sole_contributor(int64_t m) const {
    return to_.through_targets && upstream_.kl != 0 && has_own_targets(op_) &&
           op_.stats.slope(m, row_) != infinity<A>();
  }

  // One target that is a constant to its learners: its gradient does not depend on them, so their pass adds it.
  bool fuses_target_grad() const {
    return to_.has_target_grads && !to_.through_targets && op_.targets == 1 && op_.learners == op_.networks.count;
  }

  // Whether network m's shares of the targets' gradients are added in a pass of their own, once these are complete.
  bool adds_target_grads(int64_t m) const {
    return to_.has_target_grads && !fuses_target_grad() && m != op_.mix.leader;
  }

  // The gradients are 0 whatever the networks are.
  void write_zeros() {
    A* zeros = scratch_.piece(0);
    std::fill(zeros, zeros + kChunk, A(0));
    for_pieces(0, op_.cols, [&](int64_t begin, int64_t n) {
      for (int64_t m = 0; m < to_.networks.count; ++m) kdfast::write(to_.networks[m], row_, begin, n, zeros);
    });
    for (int64_t r = 0; r < to_.mix.targets; ++r) {
      for (int64_t m = 0; m < to_.mix.networks; ++m) to_.mix.put(row_, r, m, A(0));
    }
  }

  template <int kT>
  void write_piece(int64_t begin, int64_t n) {
    const int64_t at = op_.labels.index ? op_.labels.at(row_) - begin : -1;
    const int64_t label = at < n ? at : -1;  // in this piece, or negative
    A top[kMaxNetworks];
    pieces_.read(op_.networks, row_, begin, n, scratch_, 0);
    target_pieces(op_, row_, pieces_, n, scratch_, op_.networks.count, top);
    for (int64_t m = 0; m < to_.networks.count; ++m) {
      A* out = adds_target_grads(m) ? network_grad(m) : kdfast::target(to_.networks[m], row_, begin, network_grad(m));
      if (m < op_.learners) {
        const int64_t r = op_.target_of(m);
        if (m == r) start_target<kT>(r, n, label);  // its first learner
        const A dot = op_.eps == 0 ? learner<kT, false>(m, n, out) : learner<kT, true>(m, n, out);
        if (to_.mix.data) mix_dots_[m * op_.targets] += dot;
        if (label >= 0) out[label] -= upstream_.ce;
      } else {
        std::fill(out, out + n, A(0));
      }
      if (!adds_target_grads(m)) kdfast::write(to_.networks[m], row_, begin, n, out);
    }
    // A target's gradient is complete after its last learner.
    for (int64_t m = 0; m < op_.networks.count; ++m) {
      if (adds_target_grads(m)) add_target_grads(m, begin, n);
    }
  }

  // The exponentials of target r, and its gradient before its learners contribute.
  template <int kT>
  void start_target(int64_t r, int64_t n, int64_t label) {
    A *t = target(r), *g = target_grad(r);
    const A max = op_.stats.target_max(r, row_);
    write_exponentials(t, n, max, rate_, e_t_);
    if (!to_.has_target_grads || is_sole_contributor(r)) return;
    std::fill(g, g + n, A(0));
    if (!op_.target_ce) return;
    ce_grad_piece<kT>(t, e_t_, n, max, cross_entropy_coef(upstream_.ce, op_.stats.target_sum_1(r, row_)), g);
    if (label >= 0) g[label] -= upstream_.ce;
  }

  // Writes the gradient of learner m but for its label, and accumulates that of its target. -> with a fused target
  // gradient, the learner's term of the gradient of mix.
  template <int kT, bool kEps>
  A learner(int64_t m, int64_t n, A* out) {
    const Stats<A>& stats = op_.stats;
    const int64_t r = op_.target_of(m);
    const A *z = pieces_.z[m], *t = target(r), kl = upstream_.kl;
    A* g_t = target_grad(r);
    const Softmax<A> side_q = stats.learner(m, row_), side_t = stats.target(r, row_);
    const LearnerGrad<A> g = learner_grad(side_t, side_q, stats.sum_1(m, row_), stats.mass(m, row_), op_.eps, kl,
                                          op_.labels.index ? upstream_.ce : A(0));
    const A slope = A(kLog2E) * stats.slope(m, row_);
    if (kl == 0) {  // whatever the target is
      ce_piece<kT>(z, n, side_q.max, rate_, g.of_1, out);
      if (!fuses_target_grad()) return 0;
      return add_target_grad(z, side_q.max, g_t, op_.weight(row_, 0, m), n, out);
    }
    if (to_.through_targets && slope != infinity<A>()) {
      const LogSoftmax<A> q(side_q, rate_), p(side_t, rate_);
      const auto piece =
          is_sole_contributor(m) ? both_grads_piece<kT, kEps, false, A> : both_grads_piece<kT, kEps, true, A>;
      piece(z, t, e_t_, n, q, p, g, op_.eps, slope, kl, out, g_t);
    } else if (fuses_target_grad()) {
      const A w = op_.weight(row_, 0, m);
      return learner_and_target_grad_piece<kT, kEps>(z, t, e_t_, g_t, n, side_q.max, rate_, g, w, out);
    } else {
      learner_grad_piece<kT, kEps>(z, t, e_t_, n, side_q.max, rate_, g, out);
    }
    return 0;
  }

  // Writes network m's gradient plus its shares of those of all targets.
  void add_target_grads(int64_t m, int64_t begin, int64_t n) {
    const A *grads[kMaxNetworks], *from = network_grad(m);
    A weights[kMaxNetworks];
    for (int64_t r = 0; r < op_.targets; ++r) {
      grads[r] = target_grad(r);
      weights[r] = op_.weight(row_, r, m);
    }
    const A max = op_.stats.max(m, row_);
    double* dots = to_.mix.data ? mix_dots_.data() + m * op_.targets : nullptr;
    A *to = spare(0), *next = spare(1);
    for_some<5>(0, op_.targets, [&](int64_t r, auto some) {
      if (r + some.value == op_.targets) to = kdfast::target(to_.networks[m], row_, begin, to);
      target_grads_piece<some.value>(pieces_.z[m], max, grads + r, weights + r, n, from, to, dots ? dots + r : nullptr);
      from = to;
      std::swap(to, next);
    });
    kdfast::write(to_.networks[m], row_, begin, n, from);
  }

  const MixedLogits<A>& op_;
  const Gradients& to_;
  Upstream<A> upstream_;
  int64_t row_;
  A rate_;
  const Scratch<A>& scratch_;
  A* e_t_;                        // exponentials of the target in use
  std::vector<double> mix_dots_;  // gradient of mix [networks, targets]
  NetworkPieces<A> pieces_;
};

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void forward(const MixedLogits<A>& op, const Tensor& loss) const {
    check_labels(op.labels, op.rows, op.cols);
    std::vector<A> losses(op.rows);
    const double t = op.temperature.exact(0);
    const A kl = static_cast<A>(op.kl_scale * t * t * op.ramp_value()), ce = static_cast<A>(op.ce_scale);
    dispatch_temperature<1, 2, 3, 4>(op.rate(), [&](auto t_1) {
      constexpr int kT = decltype(t_1)::value;
      const int64_t pieces = ForwardRow<kT, true, A>::scratch_pieces(op);
      for_rows<A>(op.rows, op.cols, op.networks.count, pieces, [&](int64_t row, const Scratch<A>& scratch) {
        const RowLoss<A> v =
            op.eps == 0 ? forward_row<kT, false>(op, row, scratch) : forward_row<kT, true>(op, row, scratch);
        losses[row] = weighted(kl, v.kl) + weighted(ce, v.ce);
      });
    });
    reduce_rows(op.rows, true, data<A>(loss), [&](int64_t row) { return losses[row]; });
  }

  template <class A>
  void backward(const MixedLogits<A>& op, const Gradients& to, const Tensor&) const {
    const double grad = read<double>(to.upstream, 0);
    const Upstream<A> upstream{static_cast<A>(grad * (op.kl_scale * op.temperature.exact(0)) * op.ramp_value()),
                               op.labels.index ? static_cast<A>(grad * to.ce_scale / to.divisor) : A(0)};
    dispatch_temperature<1, 2, 3, 4>(op.rate(), [&](auto t_1) {
      const int64_t pieces = BackwardRow<A>::scratch_pieces(op);
      for_rows<A>(op.rows, op.cols, op.networks.count, pieces, [&](int64_t row, const Scratch<A>& scratch) {
        BackwardRow<A>(op, to, upstream, row, scratch).template write<t_1.value>();
      });
    });
  }
};

}  // namespace
}  // namespace mixed_logits
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::mixed_logits::register_ops<kdfast::mixed_logits::Cpu>(m); }
