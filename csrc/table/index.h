// The map of one shard from full 64-bit keys to handles: one writer, any number of lock-free readers, growth in pieces.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bucket.h"
#include "hash.h"
#include "reclaimer.h"
#include "row_meta.h"
#include "row_store.h"

namespace freshet {

// Extendible hashing: a directory of 2^depth entries names segments of 1 to 255 buckets. A full segment is replaced by a
// larger one or by two, so an insertion moves at most one segment's keys (about 2,600) and never the whole table.
// About 7 bytes per key: small enough that much of it stays in the caches. The keys themselves lie in the rows.
// A directory has at most 2^17 entries, which is some 200 M keys; beyond (or for ids chosen so that their hashes agree in
// more bits) insertion throws std::bad_alloc, so that such ids cost no more than that.
//
// Invariants:
//  * a key lies in the segment of its hash prefix, in its home bucket or, where all buckets from there on are full, in a
//    later one (cyclic); it never moves within a segment, so a reader that starts after `insert` returned finds it;
//  * buckets that a key went past have it in their overflow count, so a search ends at the first count of zero;
//  * the row of a handle holds its key before the handle is inserted and until it has been erased;
//  * readers hold a Reclaimer::Guard from before the first call until they are done with the buckets they got.
class Index {
 public:
  // rows, candidates (nullptr: there are none): where the keys lie, at the start of each header; they must outlive the index.
  // bits: how many top bits of the hash chose this shard and are equal for all its keys.
  Index(Reclaimer* reclaimer, const RowStore* rows, const RowStore* candidates, unsigned bits);
  ~Index();
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  // Any thread

  std::int64_t key_of(Handle handle) const noexcept {
    const char* const header = is_row(handle) ? rows_->header(handle) : candidates_->header(handle & ~kCandidateBit);
    return reinterpret_cast<const StoredKey*>(header)->load();
  }

  // The buckets of a segment, cyclic from the home of a hash on.
  struct Span {
    Bucket* bucket;
    std::uint16_t index;  // of bucket, in its segment
    std::uint16_t buckets;
    std::uint32_t steps;

    bool at_home() const noexcept { return steps == 0; }
    // On to the next bucket; false when all have been seen.
    bool step() noexcept {
      if (steps + 1 == buckets) return false;  // and so again, if asked again
      ++steps;
      const bool last = index + 1 == buckets;
      bucket = last ? bucket - index : bucket + 1;
      index = static_cast<std::uint16_t>(last ? 0 : index + 1);
      return true;
    }
  };
  Span span(std::uint64_t hash) const noexcept {
    const Entry entry = entry_at(hash);
    const std::uint32_t buckets = kBuckets[entry & kClassMask];
    const std::size_t index = bucket_index(hash, buckets);
    return {segment_of(entry)->buckets() + index, static_cast<std::uint16_t>(index),
            static_cast<std::uint16_t>(buckets), 0};
  }

  struct Found {
    const Bucket* bucket;   // the last one that was looked at
    std::uint32_t control;  // as begin_read gave it: validate after the row was copied
    Handle handle;          // kAbsent is proven already
  };
  Found find(std::int64_t key, std::uint64_t hash) const noexcept;

  std::size_t size() const noexcept { return size_.load(std::memory_order_relaxed); }  // rows and candidates

  // Appends the handles in the segment of the hash `at`, and returns the last hash that belongs to it. Beside the writer,
  // what is inserted or erased meanwhile may or may not be seen; all else is, once.
  std::uint64_t list_segment(std::uint64_t at, std::vector<Handle>* handles) const;

  // The writer

  struct Place {
    Bucket* bucket;  // nullptr if absent
    std::size_t slot;
  };
  Place locate(std::int64_t key, std::uint64_t hash) const noexcept { return locate_from(span(hash), key, hash); }
  Place locate_from(Span at, std::int64_t key, std::uint64_t hash) const noexcept {
    const Tag tag = tag_of(hash);
    do {
      for (SlotSet slots = at.bucket->slots_with(tag); !slots.empty(); slots.remove_first()) {
        if (key_of(at.bucket->at(slots.first())) == key) return {at.bucket, slots.first()};
      }
    } while (Bucket::overflow(at.bucket->control.load(std::memory_order_relaxed)) != 0 && at.step());
    return {nullptr, 0};
  }

  // Sends for what an insertion changes: the bucket and the header of its segment.
  void prefetch_for_insert(std::uint64_t hash) const noexcept {
    const Entry entry = entry_at(hash);
    prefetch_write(segment_of(entry));
    prefetch_write(segment_of(entry)->buckets() + bucket_index(hash, kBuckets[entry & kClassMask]));
  }

  // Adds the handle of an absent key. May replace its segment: spans and places in it are then retired.
  // std::bad_alloc: nothing has changed.
  Place insert(std::uint64_t hash, Handle handle);
  void erase(Place place, std::uint64_t hash) noexcept;

 private:
  // There is one writer, so no locked instruction: that would wait for every row that is still being stored.
  void set_size(std::size_t size) noexcept { size_.store(size, std::memory_order_relaxed); }

  struct alignas(kCacheLine) Segment {  // followed by its buckets
    std::uint32_t size_class;
    std::uint32_t depth;  // bits of the prefix, beyond the shard's
    std::uint32_t used;
    Bucket* buckets() noexcept { return reinterpret_cast<Bucket*>(this + 1); }
  };
  // Segment address + size class in its six low bits, so that a reader touches no header.
  using Entry = std::uint64_t;
  static constexpr Entry kClassMask = kCacheLine - 1;

  struct Directory {  // followed by 2^depth entries
    unsigned shard_bits;
    unsigned depth;
    std::atomic<Entry>* entries() const noexcept {
      return reinterpret_cast<std::atomic<Entry>*>(const_cast<Directory*>(this) + 1);
    }
    std::size_t position(std::uint64_t hash) const noexcept {
      return depth == 0 ? 0 : static_cast<std::size_t>(hash << shard_bits >> (64 - depth));
    }
  };

  // With the header, segments are whole pages. From the last size a segment splits into two, mostly of the size before:
  // the load stays between 0.57 and 0.85. Should all keys fall on one side, that side gets the last size again.
  static constexpr std::uint32_t kBuckets[] = {1, 3, 7, 15, 31, 63, 127, 191, 255};
  static constexpr std::uint32_t kLastClass = 8;

  static Segment* segment_of(Entry entry) noexcept { return reinterpret_cast<Segment*>(entry & ~kClassMask); }
  static Entry entry_of(Segment* segment) noexcept { return reinterpret_cast<Entry>(segment) | segment->size_class; }
  static std::size_t bucket_index(std::uint64_t hash, std::uint32_t buckets) noexcept {
    return static_cast<std::size_t>((hash & 0xffffffffU) * buckets >> 32);
  }
  static std::size_t limit(std::uint32_t size_class) noexcept {
    return kBuckets[size_class] * Bucket::kSlots * 17 / 20;
  }
  static std::size_t bytes(std::uint32_t size_class) noexcept {
    return sizeof(Segment) + kBuckets[size_class] * sizeof(Bucket);
  }
  static std::size_t directory_bytes(unsigned depth) noexcept {
    return sizeof(Directory) + (sizeof(std::atomic<Entry>) << depth);
  }

  Entry entry_at(std::uint64_t hash) const noexcept {
    const Directory* directory = directory_.load(std::memory_order_acquire);
    return directory->entries()[directory->position(hash)].load(std::memory_order_acquire);
  }
  void release(void* memory, std::size_t size) noexcept { reclaimer_->arena().free(memory, size); }
  Directory* make_directory(unsigned shard_bits, unsigned depth);
  Segment* make_segment(std::uint32_t size_class, unsigned depth);
  static Place place_in(Segment* segment, std::uint64_t hash, Handle handle) noexcept;
  void grow(Segment* segment, std::uint64_t hash);
  void replace(Segment* old, Segment* low, Segment* high, std::uint64_t hash, std::uint64_t side) noexcept;
  static std::uint32_t class_for(std::size_t keys) noexcept;
  void link(Segment* segment, std::uint64_t hash) noexcept;
  void deepen();

  Reclaimer* const reclaimer_;
  const RowStore* const rows_;
  const RowStore* const candidates_;
  std::atomic<Directory*> directory_;
  std::atomic<std::size_t> size_{0};
  std::vector<Handle> moving_;  // scratch of grow: the handles of a segment
  std::vector<std::uint64_t> hashes_;
};

}  // namespace freshet
