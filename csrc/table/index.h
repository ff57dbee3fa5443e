// The map of one shard from full 64-bit keys to handles: one writer, any number of lock-free readers, growth in pieces.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bucket.h"
#include "hash.h"
#include "reclaimer.h"

namespace freshet {

// Extendible hashing: a directory of 2^depth entries names segments of 1 to 511 buckets. A full segment is replaced by a
// larger one or by two, so an insertion moves at most one segment's keys (2,427) and never the whole table; keys are
// moved from bucket to bucket, and no row is touched. About 17 bytes per key.
// Where keys come and go, those that found their places taken lie ever further on. Before searches get long (a bucket has
// lost count of who went past it) the segment is laid out anew, or, if it is nearly full, grows early.
// A directory has at most 2^17 entries, which is some 200 M keys; beyond (or for ids chosen so that their hashes agree in
// more bits) insertion throws std::bad_alloc, so that such ids cost no more than that.
//
// Invariants:
//  * a key lies in the segment of its hash prefix: in its home bucket or, as a guest, in its second choice (all but one in
//    two hundred at worst) or, where that is full too, in the first one with room from there on (cyclic). Who finds both choices full
//    sends a key that is at home there to its second choice. It is there before it is gone here: a reader that goes on from
//    bucket to bucket finds it, and so every key whose `insert` returned before the search began;
//  * buckets that a key went past have it in their overflow count, so a search ends at the first count of zero;
//  * readers hold a Reclaimer::Guard from before the first call until they are done with the buckets they got.
class Index {
 public:
  // bits: how many top bits of the hash chose this shard and are equal for all its keys.
  Index(Reclaimer* reclaimer, unsigned bits);
  ~Index();
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  // Any thread

  // The buckets in which a hash may lie, in this order: its home, then cyclic from its second choice on.
  struct Span {
    Bucket* first;  // of the segment
    std::uint32_t buckets;
    std::uint32_t index;   // of the bucket at hand
    std::uint32_t second;  // where it goes on from home
    std::uint32_t steps = 0;

    Bucket& bucket() const noexcept { return first[index]; }
    // On to the next bucket; false when all have been seen.
    bool step() noexcept {
      if (steps == buckets) return false;  // and so again, if asked again
      index = steps == 0 ? second : next(index, buckets);
      ++steps;
      return true;
    }
    static std::uint32_t next(std::uint32_t index, std::uint32_t buckets) noexcept {
      return index + 1 == buckets ? 0 : index + 1;
    }
  };
  Span span(std::uint64_t hash) const noexcept {
    const Entry entry = entry_at(hash);
    return span_in(segment_of(entry), kBuckets[entry & kClassMask], hash);
  }

  // The bucket in which the search for a hash begins, and the one in which it goes on if not there.
  struct Places {
    Bucket* home;
    Bucket* second;
  };
  FRESHET_INLINE Places places(std::uint64_t hash) const noexcept {
    const Entry entry = entry_at(hash);
    const std::uint32_t buckets = kBuckets[entry & kClassMask];
    Bucket* const first = segment_of(entry)->buckets();
    return {first + bucket_index(hash, buckets), first + second_index(hash, buckets)};
  }

  struct Found {
    Bucket* bucket;         // the last one that was looked at
    std::uint32_t control;  // as begin_read gave it: validate after the row was copied
    Handle handle;          // kAbsent is proven already
  };
  Found find(std::int64_t key, std::uint64_t hash) const noexcept;

  std::size_t size() const noexcept { return size_.load(std::memory_order_relaxed); }  // rows and candidates

  // Appends the entries in the segment of the hash `at`, and returns the last hash that belongs to it. Beside the writer,
  // what is inserted or erased meanwhile may or may not be seen; all else is, once.
  std::uint64_t list_segment(std::uint64_t at, std::vector<KeyHandle>* entries) const;

  // The writer

  struct Place {
    Bucket* bucket;  // nullptr if absent
    std::size_t slot;
  };
  Place locate(std::int64_t key, std::uint64_t hash) const noexcept { return locate_from(span(hash), key); }
  Place locate_from(Span at, std::int64_t key) const noexcept {
    do {
      Bucket& bucket = at.bucket();
      const Handle handle = bucket.find(key);
      if (handle != kAbsent) return {&bucket, bucket.slot_of(handle)};
    } while (Bucket::overflow(at.bucket().control.load(std::memory_order_relaxed)) != 0 && at.step());
    return {nullptr, 0};
  }

  // Sends for what an insertion changes, beside the home bucket: the segment's header and the second choice; later, when
  // both buckets have come and are full, the buckets where the keys at home there could go.
  FRESHET_INLINE static void prefetch_for_insert(const Span& at) noexcept {
    prefetch<Intent::kWrite>(segment_of(at));
    prefetch<Intent::kWrite>(at.first + at.second);
  }
  FRESHET_INLINE static void prefetch_room(const Span& at) noexcept {
    const Bucket& home = at.bucket();
    const bool home_full = home.slot_of(kAbsent) == Bucket::kSlots;
    const bool second_full = at.first[at.second].slot_of(kAbsent) == Bucket::kSlots;
    if (!(home_full & second_full)) return;  // one branch: neither can be foreseen
#pragma GCC unroll 5
    for (std::size_t slot = 0; slot < Bucket::kSlots; ++slot) {
      const std::uint64_t hash = hash_id(home.key[slot].load(std::memory_order_relaxed));
      prefetch<Intent::kWrite>(at.first + second_index(hash, at.buckets));
    }
  }

  // Adds the handle of an absent key (`at`: the span of its hash). May replace its segment: spans and places in it are
  // then retired. std::bad_alloc: nothing has changed.
  void insert(std::int64_t key, std::uint64_t hash, Handle handle);
  FRESHET_INLINE void insert_at(const Span& at, std::int64_t key, std::uint64_t hash, Handle handle) {
    Segment* const segment = segment_of(at);
    if (segment->needs_room()) {
      grow(segment, hash);
      return insert(key, hash, handle);  // more than once only if all keys of a split fall on one side
    }
    ++segment->used;
    set_size(size() + 1);
    const std::size_t empty = at.bucket().slot_of(kAbsent);
    return empty != Bucket::kSlots ? put(segment, at.index, empty, {key, handle}) : place_guest(at, {key, handle});
  }
  // How many segments were replaced: spans from before may be in a retired one.
  std::size_t growths() const noexcept { return growths_; }
  void erase(Place place, std::uint64_t hash) noexcept;

 private:
  // There is one writer, so no locked instruction: that would wait for every row that is still being stored.
  void set_size(std::size_t size) noexcept { size_.store(size, std::memory_order_relaxed); }

  struct alignas(kCacheLine) Segment {  // followed by its buckets
    std::uint32_t size_class;
    std::uint32_t depth;  // bits of the prefix, beyond the shard's
    std::uint32_t used;
    std::uint32_t limit;  // of used
    bool worn = false;  // a bucket has lost count of the keys that went past it, and no search would end there again
    std::atomic<std::uint32_t> moves{0};  // odd while a key goes from one bucket to a later one
    bool needs_room() const noexcept { return used >= limit || worn; }
    void begin_move() noexcept {
      moves.store(moves.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_release);
    }
    void end_move() noexcept { moves.store(moves.load(std::memory_order_relaxed) + 1, std::memory_order_release); }
    Bucket* buckets() noexcept { return reinterpret_cast<Bucket*>(this + 1); }
    const Bucket* buckets() const noexcept { return reinterpret_cast<const Bucket*>(this + 1); }
  };
  // Segment address + size class in its six low bits, so that a reader touches no header.
  using Entry = std::uint64_t;
  static constexpr Entry kClassMask = kCacheLine - 1;

  struct alignas(kCacheLine) Directory {  // followed by 2^depth entries
    unsigned shard_bits;
    unsigned depth;
    unsigned shift;  // 63 - depth
    std::atomic<Entry>* entries() const noexcept {
      return reinterpret_cast<std::atomic<Entry>*>(const_cast<Directory*>(this) + 1);
    }
    std::size_t position(std::uint64_t hash) const noexcept {
      return static_cast<std::size_t>(hash << shard_bits >> 1 >> shift);
    }
  };

  // With the header, the larger segments are whole pages. From the last size a segment splits into two, mostly of the
  // last but one: the load stays between 0.63 and 0.95, where keys come and go between 0.57 and 0.95. Should all keys fall
  // on one side, it gets the last size again.
  static constexpr std::uint32_t kBuckets[] = {1, 3, 7, 15, 31, 63, 127, 255, 383, 511};
  static constexpr std::uint32_t kLastClass = 9;

  static Segment* segment_of(const Span& span) noexcept { return reinterpret_cast<Segment*>(span.first) - 1; }
  static Segment* segment_of(Entry entry) noexcept { return reinterpret_cast<Segment*>(entry & ~kClassMask); }
  static Entry entry_of(Segment* segment) noexcept { return reinterpret_cast<Entry>(segment) | segment->size_class; }
  static std::uint32_t bucket_index(std::uint64_t hash, std::uint32_t buckets) noexcept {
    return static_cast<std::uint32_t>((hash & 0xffffffffU) * buckets >> 32);
  }
  static std::uint32_t second_index(std::uint64_t hash, std::uint32_t buckets) noexcept {
    return bucket_index(hash * kGolden >> 32, buckets);
  }
  static Span span_in(Segment* segment, std::uint32_t buckets, std::uint64_t hash) noexcept {
    return {segment->buckets(), buckets, bucket_index(hash, buckets), second_index(hash, buckets)};
  }
  static std::size_t limit(std::uint32_t size_class) noexcept {
    return kBuckets[size_class] * Bucket::kSlots * 19 / 20;
  }
  static bool has_room(std::uint32_t size_class, std::size_t keys) noexcept {
    return keys <= limit(size_class) * 9 / 10;
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
  Segment* make_segment(std::uint32_t size_class, unsigned depth, std::size_t used);  // used: keys to come
  static void put(Segment* segment, std::uint32_t b, std::size_t slot, KeyHandle entry) noexcept {
    Bucket& bucket = segment->buckets()[b];
    const BucketLock lock(bucket);
    bucket.set(slot, entry.key, entry.handle);
  }
  static void put_from(Segment* segment, std::uint32_t b, KeyHandle entry) noexcept;
  static void pass(Segment* segment, std::uint32_t b) noexcept;
  template <typename Fill>
  static bool make_room(Segment* segment, std::uint32_t b, const Fill& fill) noexcept;
  static void place_guest(const Span& at, KeyHandle entry) noexcept;
  void grow(Segment* segment, std::uint64_t hash);
  void list_moving(const Segment* segment) noexcept;
  void find_homes(std::uint32_t low, std::uint32_t high, std::uint64_t side) noexcept;
  void replace(Segment* old, Segment* low, Segment* high, std::uint64_t hash, std::uint64_t side) noexcept;
  static std::uint32_t class_for(std::size_t keys) noexcept;
  void link(Segment* segment, std::uint64_t hash) noexcept;
  void deepen();

  Reclaimer* const reclaimer_;
  std::atomic<Directory*> directory_;
  std::atomic<std::size_t> size_{0};
  std::size_t growths_ = 0;
  // Scratch of grow: what a segment holds, and where it goes. One array per kind, so that loops over them are vectors.
  struct Moving {
    std::size_t n = 0;
    std::vector<std::int64_t> keys;
    std::vector<Handle> handles;
    std::vector<std::uint64_t> hashes;
    std::vector<std::uint32_t> homes;  // bucket of the lower successor; of the upper one, kUpper + bucket

    void reserve(std::size_t most) {
      if (most < keys.size()) return;
      for (auto* const numbers : {&handles, &homes}) numbers->resize(most + 1);
      hashes.resize(most + 1);
      keys.resize(most + 1);  // last: it tells whether all have room
    }
  };
  static constexpr std::uint32_t kUpper = kBuckets[kLastClass] + 1;
  Moving moving_;
};

}  // namespace freshet
