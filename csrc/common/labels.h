// The labels of a batch: classes (int64), or the probabilities of all classes.
#pragma once

#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace kdfast {

// Both pointers are null where there are no labels.
struct Labels {
  const int64_t* index = nullptr;
  int64_t stride = 0;
  Matrix probabilities;

  KD_HD int64_t at(int64_t row) const { return index[row * stride]; }
  KD_HD bool is_class(int64_t row, int64_t cols) const { return at(row) >= 0 && at(row) < cols; }
};

inline Labels labels_of(const std::optional<Tensor>& labels) {
  if (!labels) return {};
  if (labels->dim() == 2) return {nullptr, 0, matrix(*labels)};
  return {static_cast<const int64_t*>(labels->data_ptr()), labels->stride(0), Matrix{}};
}

// On the CPU. Throws for a label that is neither a class nor `ignore_index`, if that is given.
inline void check_labels(const Labels& labels, int64_t rows, int64_t cols, const int64_t* ignore_index = nullptr) {
  for (int64_t row = 0; labels.index && row < rows; ++row) {
    if (labels.is_class(row, cols) || (ignore_index && labels.at(row) == *ignore_index)) continue;
    throw std::invalid_argument("labels[" + std::to_string(row) + "] is " + std::to_string(labels.at(row)) +
                                ", expected a class from 0 to " + std::to_string(cols - 1) +
                                (ignore_index ? " or ignore_index=" + std::to_string(*ignore_index) : ""));
  }
}

}  // namespace kdfast
