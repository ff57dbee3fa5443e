// An open-addressing map from full 64-bit ids to 64-bit values.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace freshet {

// The splitmix64 finaliser: a bijection of 64-bit words, so distinct ids keep distinct hashes.
inline std::uint64_t mix64(std::uint64_t x) noexcept {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Invariants:
//  * capacity is a power of two; at most 3/4 of the places are taken, so every probe ends at an empty place;
//  * a key sits at its home place or, with no empty place in between, after it (linear probing); erasing shifts
//    later keys back, so there are no deletion marks and probes never get longer with churn;
//  * keys are compared in full: two ids never share a value, whatever their hashes;
//  * only `reserve` allocates (and gives the strong guarantee); all else is noexcept.
class IdMap {
 public:
  // Never a value: marks an empty place, and is what `find` answers for an absent key.
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};

  explicit IdMap(std::uint64_t salt = 0) : salt_(salt) {}

  std::size_t size() const noexcept { return size_; }
  std::size_t memory_bytes() const noexcept { return places_.capacity() * sizeof(Place); }

  // Makes room for `entries` keys in all. On std::bad_alloc or std::length_error nothing has changed.
  void reserve(std::size_t entries) {
    std::size_t capacity = places_.empty() ? kMinCapacity : places_.size();
    while (capacity / 4 * 3 < entries) capacity *= 2;
    if (capacity == places_.size()) return;
    std::vector<Place> old(capacity);
    old.swap(places_);
    for (const Place& place : old) {
      if (place.value != kNone) places_[probe(place.key)] = place;
    }
  }

  std::uint64_t find(std::int64_t key) const noexcept {
    return places_.empty() ? kNone : places_[probe(key)].value;
  }

  // Sets the value of `key`; true if the key is new. Needs reserve(size() + 1) before.
  bool set(std::int64_t key, std::uint64_t value) noexcept {
    assert(value != kNone && size_ < places_.size() / 4 * 3);
    Place& place = places_[probe(key)];
    const bool is_new = place.value == kNone;
    place = {key, value};
    size_ += is_new ? 1 : 0;
    return is_new;
  }

  // Removes `key`; returns its value, or kNone if it was absent.
  std::uint64_t erase(std::int64_t key) noexcept {
    if (places_.empty()) return kNone;
    const std::size_t mask = places_.size() - 1;
    std::size_t hole = probe(key);
    const std::uint64_t value = places_[hole].value;
    if (value == kNone) return kNone;
    for (std::size_t i = (hole + 1) & mask; places_[i].value != kNone; i = (i + 1) & mask) {
      // The key at i may move back to the hole unless its home lies after the hole (cyclically).
      if (((i - home(places_[i].key)) & mask) >= ((i - hole) & mask)) {
        places_[hole] = places_[i];
        hole = i;
      }
    }
    places_[hole].value = kNone;
    --size_;
    return value;
  }

  // Calls visit(key, value) for every entry, in no particular order.
  template <typename Visit>
  void for_each(Visit visit) const {
    for (const Place& place : places_) {
      if (place.value != kNone) visit(place.key, place.value);
    }
  }

 private:
  struct Place {
    std::int64_t key = 0;
    std::uint64_t value = kNone;
  };
  static constexpr std::size_t kMinCapacity = 16;

  std::size_t home(std::int64_t key) const noexcept {
    return static_cast<std::size_t>(mix64(static_cast<std::uint64_t>(key) ^ salt_)) & (places_.size() - 1);
  }

  // Where `key` is, or the empty place where it would go.
  std::size_t probe(std::int64_t key) const noexcept {
    const std::size_t mask = places_.size() - 1;
    std::size_t i = home(key);
    while (places_[i].value != kNone && places_[i].key != key) i = (i + 1) & mask;
    return i;
  }

  std::uint64_t salt_;
  std::size_t size_ = 0;
  std::vector<Place> places_;
};

}  // namespace freshet
