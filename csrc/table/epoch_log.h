// Keys by the epoch in which something happened to them: what a delta has to name.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <vector>

namespace freshet {

using Epoch = std::uint32_t;

// Invariant: the log holds every key noted in the epochs above `complete_after()`, in order; a key may be there twice.
// A limit makes it forget the oldest epochs (or the open one, if that alone is too long): then it is complete after those.
class EpochLog {
 public:
  Epoch complete_after() const noexcept { return complete_after_; }
  std::size_t size() const noexcept { return size_; }
  std::size_t memory_bytes() const noexcept {
    std::size_t bytes = 0;
    for (const Keys& part : parts_) bytes += part.keys.capacity() * sizeof(std::int64_t);
    return bytes;
  }

  // Makes `more` calls of note in `epoch` safe, remembering about `limit` keys at most. std::bad_alloc: no key is lost.
  void reserve(Epoch epoch, std::size_t more, std::size_t limit = std::numeric_limits<std::size_t>::max()) {
    while (size_ + more > limit && !parts_.empty()) forget_oldest();
    if (more > limit) complete_after_ = epoch;
    if (complete_after_ >= epoch) return;  // the open epoch is too long to be worth a list
    if (parts_.empty() || parts_.back().epoch != epoch) parts_.push_back({epoch, {}});
    std::vector<std::int64_t>& keys = parts_.back().keys;
    if (keys.capacity() < keys.size() + more) keys.reserve(std::max(2 * keys.size(), keys.size() + more));
  }

  // Needs reserve before, in the same epoch.
  void note(std::int64_t key) noexcept {
    if (parts_.empty()) return;
    parts_.back().keys.push_back(key);
    ++size_;
  }

  // Forgets the epochs up to and including `epoch`; returns how many keys that were.
  std::size_t drop(Epoch epoch) noexcept {
    const std::size_t before = size_;
    while (!parts_.empty() && parts_.front().epoch <= epoch) forget_oldest();
    complete_after_ = std::max(complete_after_, epoch);
    return before - size_;
  }

  void clear(Epoch complete_after) noexcept {
    parts_.clear();
    size_ = 0;
    complete_after_ = complete_after;
  }

  // Calls visit(key, epoch) for everything noted in epochs > since.
  template <typename Visit>
  void for_each_after(Epoch since, Visit visit) const {
    for (const Keys& part : parts_) {
      if (part.epoch <= since) continue;
      for (const std::int64_t key : part.keys) visit(key, part.epoch);
    }
  }

 private:
  struct Keys {
    Epoch epoch;
    std::vector<std::int64_t> keys;
  };

  void forget_oldest() noexcept {
    complete_after_ = std::max(complete_after_, parts_.front().epoch);
    size_ -= parts_.front().keys.size();
    parts_.pop_front();
  }

  std::deque<Keys> parts_;  // epochs ascending
  std::size_t size_ = 0;
  Epoch complete_after_ = 0;
};

}  // namespace freshet
