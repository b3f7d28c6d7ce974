// The ops' checks, memory and types, on every device. See common/host.h.
#pragma once

#include "common/host.h"
#include "mixed_logits/layout.h"

namespace kdfast {
namespace mixed_logits {

template <class A>
MixedLogits<A> make_op(const std::vector<Tensor>& networks, const std::optional<Tensor>& mix,
                       const std::optional<Tensor>& labels, const std::optional<Tensor>& ramp,
                       const std::optional<Tensor>& temperatures, int64_t learners, double temperature, double eps,
                       double kl_scale, double ce_scale, int64_t divisor, bool target_ce, const Tensor& stats) {
  const int64_t rows = networks[0].size(0), cols = networks[0].size(1);
  const int64_t count = static_cast<int64_t>(networks.size()), targets = targets_of(mix, count);
  return {networks_of(networks),
          mix_of(mix, count),
          labels_of(labels),
          column(ramp),
          {temperature, temperatures},
          rows,
          cols,
          learners,
          targets,
          A(eps),
          kl_scale / divisor,
          ce_scale / divisor,
          target_ce,
          Stats<A>{data<A>(stats), rows, count, learners, targets}};
}

template <class Backend>
TwoTensors forward(std::vector<Tensor> networks, std::optional<Tensor> mix, std::optional<Tensor> labels,
                   std::optional<Tensor> ramp, std::optional<Tensor> temperatures, int64_t learners, double temperature,
                   double eps, double kl_scale, double ce_scale, int64_t divisor, bool target_ce) {
  const Backend backend(networks[0]);
  const int64_t rows = networks[0].size(0), count = static_cast<int64_t>(networks.size());
  const int64_t targets = targets_of(mix, count);
  const ScalarType dtype = accumulator(networks, mix);
  Tensor loss = empty(networks[0], dtype, {});
  Tensor stats = empty(networks[0], dtype, {stats_count(count, learners, targets), rows});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    backend.forward(make_op<A>(networks, mix, labels, ramp, temperatures, learners, temperature, eps, kl_scale,
                               ce_scale, divisor, target_ce, stats),
                    loss);
  });
  return {loss, stats};
}

template <class Backend>
TwoTensors backward(Tensor grad, std::vector<Tensor> networks, std::optional<Tensor> mix, std::optional<Tensor> labels,
                    std::optional<Tensor> ramp, std::optional<Tensor> temperatures, Tensor stats, int64_t learners,
                    double temperature, double eps, double kl_scale, double ce_scale, int64_t divisor, bool target_ce,
                    bool through_targets, bool need_mix) {
  const Backend backend(networks[0]);
  const int64_t rows = networks[0].size(0), cols = networks[0].size(1), count = static_cast<int64_t>(networks.size());
  const bool has_target_grads = through_targets || target_ce;
  Tensor grads = empty(networks[0], networks[0].scalar_type(), {has_target_grads ? count : learners, rows, cols});
  Tensor mix_grad = need_mix ? empty(*mix, mix->scalar_type(), {rows, mix->size(1), mix->size(2)}) : nothing(grad);
  const Gradients to{column(grad),    network_grads(grads), need_mix ? mix_of(mix_grad, count) : Mix{},
                     ce_scale,        double(divisor),      through_targets,
                     has_target_grads};
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    backend.backward(make_op<A>(networks, mix, labels, ramp, temperatures, learners, temperature, eps, kl_scale,
                                ce_scale, divisor, target_ce, stats),
                     to, stats);
  });
  return {grads, mix_grad};
}

template <class Backend>
void register_ops(StableLibrary& m) {
  m.impl("mixed_logits_kl", TORCH_BOX(&forward<Backend>));
  m.impl("mixed_logits_kl_backward", TORCH_BOX(&backward<Backend>));
}

}  // namespace mixed_logits
}  // namespace kdfast
