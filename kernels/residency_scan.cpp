#include "hestia/kernels/residency_scan.hpp"

#include <algorithm>
#include <vector>

namespace hestia {
namespace {

/// The best few of a row, sorted by chosen_before; candidates come by rising expert index.
class BestFew {
 public:
  explicit BestFew(std::int64_t most) : most_(static_cast<std::size_t>(most)), best_(most_ + 1) {}

  void clear() { size_ = 0; }
  [[nodiscard]] std::size_t size() const { return size_; }
  ResidencyCandidate& operator[](std::size_t i) { return best_[i]; }

  /// True when nothing whose score with the bonus is at most `adjusted` can get in: ties need the whole comparison, so
  /// not at equality.
  [[nodiscard]] bool shuts_out(std::int32_t adjusted) const {
    return size_ == most_ && (most_ == 0 || adjusted < best_[most_ - 1].adjusted);
  }

  void offer(const ResidencyCandidate& candidate) {
    std::size_t at = size_;
    while (at > 0 && chosen_before(candidate, best_[at - 1])) {
      best_[at] = best_[at - 1];  // the place past the last holds what falls out
      --at;
    }
    best_[at] = candidate;
    size_ = std::min(size_ + 1, most_);
  }

 private:
  std::size_t most_;
  std::size_t size_ = 0;
  std::vector<ResidencyCandidate> best_;
};

/// One sequence after another; the buffers are those of a row.
class Scan {
 public:
  explicit Scan(const ResidencyShape& shape)
      : shape_(shape),
        kept_(std::min(shape.always_keep, shape.top_k)),
        // More slots than experts are never used.
        slots_(static_cast<std::size_t>(std::min(shape.slots, shape.num_experts))),
        weights_(shape.score == ResidencyScore::kLogit ? 0 : static_cast<std::size_t>(shape.num_experts)),
        own_(static_cast<std::size_t>(shape.num_experts)),
        adjusted_(own_.size()),
        resident_(own_.size(), 0.0F),
        in_step_(own_.size(), 0),
        first_(kept_),
        chosen_(shape.top_k) {}

  void start_sequence() {
    for (const std::int32_t expert : residents_) {
      resident_[static_cast<std::size_t>(expert)] = 0.0F;
    }
    residents_.clear();
  }

  void token(const float* logits, float bonus, std::int64_t* selected) {
    const float* scores = logits;
    if (routes_by_weight(shape_.score, bonus, shape_.always_keep, shape_.top_k)) {
      weight_scores(shape_.score, logits, shape_.num_experts, weights_.data());
      scores = weights_.data();
    }
    order(scores, resident_.data(), bonus, own_.data(), adjusted_.data(), shape_.num_experts);
    first_.clear();
    for (std::size_t expert = 0; kept_ > 0 && expert < own_.size(); ++expert) {
      if (!first_.shuts_out(own_[expert])) {
        first_.offer({own_[expert], own_[expert], static_cast<std::int32_t>(expert)});
      }
    }
    for (std::size_t i = 0; i < first_.size(); ++i) {
      adjusted_[static_cast<std::size_t>(first_[i].expert)] = INT32_MAX;
    }
    chosen_.clear();
    for (std::size_t expert = 0; expert < own_.size(); ++expert) {
      if (!chosen_.shuts_out(adjusted_[expert])) {
        chosen_.offer({adjusted_[expert], own_[expert], static_cast<std::int32_t>(expert)});
      }
    }
    // By the score alone: insertion, for the few of them are nearly in order.
    const auto top_k = static_cast<std::size_t>(shape_.top_k);
    for (std::size_t i = 0; i < top_k; ++i) {
      ResidencyCandidate candidate = chosen_[i];
      candidate.adjusted = candidate.own;
      std::size_t at = i;
      for (; at > 0 && chosen_before(candidate, chosen_[at - 1]); --at) {
        chosen_[at] = chosen_[at - 1];
      }
      chosen_[at] = candidate;
    }
    for (std::size_t k = 0; k < top_k; ++k) {
      selected[k] = chosen_[k].expert;
    }
    serve(selected);
  }

 private:
  static void order(const float* __restrict__ scores, const float* __restrict__ resident, float bonus,
                    std::int32_t* __restrict__ own, std::int32_t* __restrict__ adjusted, std::int64_t num_experts) {
    for (std::int64_t expert = 0; expert < num_experts; ++expert) {
      own[expert] = ordered_logit(scores[expert]);
      // The product is exact, so that a fused multiply-add gives the same.
      adjusted[expert] = ordered_logit(scores[expert] + resident[expert] * bonus);
    }
  }

  /// LRU by whole steps holds the C experts touched last, K above C included: the step's from the highest weight down,
  /// then those that were there, in their order.
  void serve(const std::int64_t* selected) {
    before_.swap(residents_);
    residents_.clear();
    for (std::int64_t k = 0; k < shape_.top_k; ++k) {
      in_step_[static_cast<std::size_t>(selected[k])] = 1;
      if (residents_.size() < slots_) {
        residents_.push_back(static_cast<std::int32_t>(selected[k]));
      }
    }
    for (const std::int32_t expert : before_) {
      resident_[static_cast<std::size_t>(expert)] = 0.0F;
      if (residents_.size() < slots_ && in_step_[static_cast<std::size_t>(expert)] == 0) {
        residents_.push_back(expert);
      }
    }
    for (const std::int32_t expert : residents_) {
      resident_[static_cast<std::size_t>(expert)] = 1.0F;
    }
    for (std::int64_t k = 0; k < shape_.top_k; ++k) {
      in_step_[static_cast<std::size_t>(selected[k])] = 0;
    }
  }

  ResidencyShape shape_;
  std::int64_t kept_;
  std::size_t slots_;
  std::vector<float> weights_;
  std::vector<std::int32_t> own_;
  std::vector<std::int32_t> adjusted_;
  std::vector<float> resident_;  // 1 or 0
  std::vector<std::uint8_t> in_step_;
  std::vector<std::int32_t> residents_;  // most recently touched first
  std::vector<std::int32_t> before_;
  BestFew first_;
  BestFew chosen_;
};

}  // namespace

void residency_scan_cpu(const ResidencyShape& shape, const float* logits, const float* strength,
                        const std::int64_t* run_begin, const std::int64_t* run_end, std::int64_t num_runs,
                        std::int64_t* selected) {
  Scan scan(shape);
  for (std::int64_t run = 0; run < num_runs; ++run) {
    scan.start_sequence();
    for (std::int64_t token = run_begin[run]; token < run_end[run]; ++token) {
      scan.token(logits + token * shape.num_experts, bonus_at(shape.bonus, strength, token),
                 selected + token * shape.top_k);
    }
  }
}

}  // namespace hestia
