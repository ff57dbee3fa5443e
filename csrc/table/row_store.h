// Rows of floats in chunked slabs, with a free list.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace freshet {

inline void copy_floats(const float* from, std::size_t n, float* to) noexcept {
  if (n != 0) std::memcpy(to, from, n * sizeof(float));
}

// What the table knows about a row beside its floats; kept apart so that sweeps never touch the rows.
struct RowMeta {
  std::int64_t key;
  std::int64_t last_update_us;  // event time, 0 = unknown
  std::uint64_t dirty_epoch;    // epoch of the last change; 0 = the row is free
};

// Invariants:
//  * a row's address never changes while the store lives: growing adds a chunk and copies nothing;
//  * every row number below `end()` is either taken (dirty_epoch != 0) or on the free list, never both;
//  * the free list has room for every row, so `take` and `give_back` never allocate.
class RowStore {
 public:
  static constexpr std::size_t kChunkRows = 1024;

  explicit RowStore(std::size_t row_floats) : stride_((row_floats + 3) / 4 * 4) {}

  std::uint64_t end() const noexcept { return end_; }
  std::size_t memory_bytes() const noexcept {
    return chunks_.size() * kChunkRows * (stride_ * sizeof(float) + sizeof(RowMeta)) +
           free_.capacity() * sizeof(std::uint64_t);
  }

  float* row(std::uint64_t r) noexcept { return chunks_[r / kChunkRows].floats.get() + offset(r); }
  const float* row(std::uint64_t r) const noexcept { return chunks_[r / kChunkRows].floats.get() + offset(r); }
  RowMeta& meta(std::uint64_t r) noexcept { return chunks_[r / kChunkRows].meta[r % kChunkRows]; }
  const RowMeta& meta(std::uint64_t r) const noexcept { return chunks_[r / kChunkRows].meta[r % kChunkRows]; }

  // Makes `rows` calls of `take` safe. On std::bad_alloc no row has changed.
  void reserve(std::size_t rows) {
    while (free_.size() + (chunks_.size() * kChunkRows - end_) < rows) add_chunk();
  }

  // An uninitialised row; the caller sets its floats and its meta. Needs reserve before.
  std::uint64_t take() noexcept {
    if (free_.empty()) {
      assert(end_ < chunks_.size() * kChunkRows);
      return end_++;
    }
    const std::uint64_t r = free_.back();
    free_.pop_back();
    return r;
  }

  void give_back(std::uint64_t r) noexcept {
    meta(r).dirty_epoch = 0;
    free_.push_back(r);  // never allocates: capacity covers every row
  }

 private:
  struct FreeFloats {
    void operator()(float* p) const noexcept { ::operator delete[](p, std::align_val_t{64}); }
  };
  struct Chunk {
    std::unique_ptr<float[], FreeFloats> floats;
    std::unique_ptr<RowMeta[]> meta;
  };

  std::size_t offset(std::uint64_t r) const noexcept { return r % kChunkRows * stride_; }

  void add_chunk() {
    const std::size_t bytes = kChunkRows * stride_ * sizeof(float);
    Chunk chunk;
    chunk.floats.reset(static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
    chunk.meta.reset(new RowMeta[kChunkRows]);
    grow(free_, (chunks_.size() + 1) * kChunkRows);
    grow(chunks_, chunks_.size() + 1);
    chunks_.push_back(std::move(chunk));
  }

  // reserve() alone would grow by one each time and so copy quadratically often.
  template <typename T>
  static void grow(std::vector<T>& v, std::size_t capacity) {
    if (capacity > v.capacity()) v.reserve(capacity < 2 * v.capacity() ? 2 * v.capacity() : capacity);
  }

  std::size_t stride_;
  std::uint64_t end_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<std::uint64_t> free_;
};

}  // namespace freshet
