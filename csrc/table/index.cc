#include "index.h"

#include <algorithm>
#include <new>

namespace freshet {

Index::Index(Reclaimer* reclaimer, unsigned bits) : reclaimer_(reclaimer), directory_(make_directory(bits, 0)) {
  try {
    directory_.load()->entries()[0].store(entry_of(make_segment(0, 0, 0)));
  } catch (...) {
    release(directory_.load(), directory_bytes(0));
    throw;
  }
}

Index::~Index() {
  Directory* const directory = directory_.load();
  for (std::size_t i = 0; i < std::size_t{1} << directory->depth;) {
    Segment* const segment = segment_of(directory->entries()[i].load());
    i += std::size_t{1} << (directory->depth - segment->depth);
    release(segment, bytes(segment->size_class));
  }
  release(directory, directory_bytes(directory->depth));
}

Index::Segment* Index::make_segment(std::uint32_t size_class, unsigned depth, std::size_t used) {
  auto* const segment = new (reclaimer_->arena().allocate(bytes(size_class))) Segment;
  segment->size_class = size_class;
  segment->depth = depth;
  segment->used = static_cast<std::uint32_t>(used);
  segment->limit = static_cast<std::uint32_t>(limit(size_class));
  for (std::uint32_t b = 0; b < kBuckets[size_class]; ++b) (new (segment->buckets() + b) Bucket)->clear();
  return segment;
}

Index::Directory* Index::make_directory(unsigned shard_bits, unsigned depth) {
  auto* const directory = static_cast<Directory*>(reclaimer_->arena().allocate(directory_bytes(depth)));
  directory->shard_bits = shard_bits;
  directory->depth = depth;
  directory->shift = 63 - depth;
  for (std::size_t i = 0; i < std::size_t{1} << depth; ++i) new (directory->entries() + i) std::atomic<Entry>(0);
  return directory;
}

Index::Found Index::find(std::int64_t key, std::uint64_t hash) const noexcept {
  for (Span at = span(hash);;) {
    Bucket& bucket = at.bucket();
    const std::uint32_t control = bucket.begin_read();
    if (Bucket::retired(control)) {
      at = span(hash);
      continue;
    }
    const Handle handle = bucket.find(key);
    if (handle != kAbsent) return {&bucket, control, handle};
    if (!bucket.end_read(control)) continue;
    if (Bucket::overflow(control) == 0 || !at.step()) return {&bucket, control, kAbsent};
  }
}

std::uint64_t Index::list_segment(std::uint64_t at, std::vector<KeyHandle>* entries) const {
  const std::size_t before = entries->size();
  for (;;) {
    entries->resize(before);
    const Directory* directory = directory_.load(std::memory_order_acquire);
    const Entry entry = directory->entries()[directory->position(at)].load(std::memory_order_acquire);
    const std::uint32_t moves = segment_of(entry)->moves.load(std::memory_order_acquire);
    bool retired = false;
    for (std::uint32_t b = 0; b < kBuckets[entry & kClassMask] && !retired; ++b) {
      const Bucket& bucket = segment_of(entry)->buckets()[b];
      const std::size_t start = entries->size();
      for (;;) {
        const std::uint32_t control = bucket.begin_read();
        retired = Bucket::retired(control);
        for (std::size_t slot = 0; slot < Bucket::kSlots; ++slot) {
          const Handle handle = bucket.at(slot);
          if (handle == kAbsent) continue;
          KeyHandle& added = entries->emplace_back();  // filled in place: a copy of a temporary would wait for its parts
          added.key = bucket.key[slot].load(std::memory_order_relaxed);
          added.handle = handle;
        }
        if (bucket.end_read(control)) break;
        entries->resize(start);
      }
    }
    if (retired) continue;  // the directory names its successor already
    std::atomic_thread_fence(std::memory_order_acquire);
    if (moves % 2 != 0 || moves != segment_of(entry)->moves.load(std::memory_order_relaxed)) continue;
    const unsigned prefix = directory->shard_bits + segment_of(entry)->depth;
    return prefix == 0 ? ~std::uint64_t{0} : at | (~std::uint64_t{0} >> prefix);
  }
}

void Index::pass(Segment* segment, std::uint32_t b) noexcept {
  const BucketLock lock(segment->buckets()[b]);
  if (!segment->buckets()[b].count_overflow()) segment->worn = true;
}

// Into the first bucket with room from b on. Ends: a segment is never full.
void Index::put_from(Segment* segment, std::uint32_t b, KeyHandle entry) noexcept {
  for (;; b = Span::next(b, kBuckets[segment->size_class])) {
    const std::size_t empty = segment->buckets()[b].slot_of(kAbsent);
    if (empty != Bucket::kSlots) return put(segment, b, empty, entry);
    pass(segment, b);
  }
}

// Frees a slot of the full bucket b: one of the keys that have their home there becomes a guest in its second choice.
// Calls fill(slot), and only then is that key gone from b. False if none finds room.
template <typename Fill>
bool Index::make_room(Segment* segment, std::uint32_t b, const Fill& fill) noexcept {
  const Bucket& bucket = segment->buckets()[b];
  for (std::size_t slot = 0; slot < Bucket::kSlots; ++slot) {
    const KeyHandle own = {bucket.key[slot].load(std::memory_order_relaxed), bucket.at(slot)};
    const Span at = span_in(segment, kBuckets[segment->size_class], hash_id(own.key));
    if (at.index != b) continue;
    const std::size_t empty = segment->buckets()[at.second].slot_of(kAbsent);
    if (empty == Bucket::kSlots) continue;
    segment->begin_move();
    pass(segment, b);
    put(segment, at.second, empty, own);
    fill(slot);
    segment->end_move();
    return true;
  }
  return false;
}

// For a key whose home is full.
void Index::place_guest(const Span& at, KeyHandle entry) noexcept {
  Segment* const segment = segment_of(at);
  const auto put_in = [&](std::uint32_t b) { return [&, b](std::size_t slot) { put(segment, b, slot, entry); }; };
  const bool second_is_full = segment->buckets()[at.second].slot_of(kAbsent) == Bucket::kSlots;
  if (second_is_full && make_room(segment, at.index, put_in(at.index))) return;
  pass(segment, at.index);
  if (second_is_full && make_room(segment, at.second, put_in(at.second))) return;
  put_from(segment, at.second, entry);
}

void Index::insert(std::int64_t key, std::uint64_t hash, Handle handle) {
  insert_at(span(hash), key, hash, handle);
}

void Index::erase(Place place, std::uint64_t hash) noexcept {
  Segment* const segment = segment_of(entry_at(hash));
  for (Span at = span(hash); &at.bucket() != place.bucket; at.step()) {
    const BucketLock lock(at.bucket());
    at.bucket().uncount_overflow();
  }
  {
    const BucketLock lock(*place.bucket);
    place.bucket->set(place.slot, 0, kAbsent);
  }
  --segment->used;
  set_size(size() - 1);
}

std::uint32_t Index::class_for(std::size_t keys) noexcept {
  std::uint32_t size_class = 0;
  while (size_class < kLastClass && !has_room(size_class, keys)) ++size_class;
  return size_class;
}

// Replaces a segment that is full, or nearly so, by a larger one or by two; one that is worn alone by its like, in which
// the counts are right and keys that had to go far are near again. std::bad_alloc: nothing has changed.
void Index::grow(Segment* old, std::uint64_t hash) {
  reclaimer_->reserve();
  const std::uint32_t size_class = old->size_class + (has_room(old->size_class, old->used) ? 0 : 1);
  const bool split = size_class > kLastClass;
  if (split && old->depth == directory_.load(std::memory_order_relaxed)->depth) deepen();
  moving_.reserve(kBuckets[old->size_class] * Bucket::kSlots);
  list_moving(old);
  const unsigned shard_bits = directory_.load(std::memory_order_relaxed)->shard_bits;
  const std::uint64_t side = std::uint64_t{1} << (63 - shard_bits - old->depth);  // the bit that tells the halves apart
  if (!split) {
    replace(old, make_segment(size_class, old->depth, moving_.n), nullptr, hash, side);
    return;
  }
  std::size_t upper = 0;
  for (std::size_t i = 0; i < moving_.n; ++i) upper += (moving_.hashes[i] & side) != 0 ? 1 : 0;
  const std::uint32_t low_class = class_for(moving_.n - upper);
  Segment* const low = make_segment(low_class, old->depth + 1, moving_.n - upper);
  try {
    replace(old, low, make_segment(class_for(upper), old->depth + 1, upper), hash, side);
  } catch (...) {
    release(low, bytes(low_class));
    throw;
  }
}

// The keys of a segment, their handles and hashes. Only the writer changes slots, so it needs no lock to read them.
FRESHET_CLONES void Index::list_moving(const Segment* segment) noexcept {
  std::int64_t* const keys = moving_.keys.data();
  Handle* const handles = moving_.handles.data();
  std::size_t n = 0;
  for (std::uint32_t b = 0; b < kBuckets[segment->size_class]; ++b) {
    const Bucket& bucket = segment->buckets()[b];
    for (std::size_t slot = 0; slot < Bucket::kSlots; ++slot) {  // no branch: the next one overwrites what is empty
      keys[n] = bucket.key[slot].load(std::memory_order_relaxed);
      handles[n] = bucket.handle[slot].load(std::memory_order_relaxed);
      n += handles[n] != kAbsent ? 1 : 0;
    }
  }
  moving_.n = n;
  std::uint64_t* const hashes = moving_.hashes.data();
  for (std::size_t i = 0; i < n; ++i) hashes[i] = hash_id(keys[i]);
}

// low, high: how many buckets the successors have.
FRESHET_CLONES void Index::find_homes(std::uint32_t low, std::uint32_t high, std::uint64_t side) noexcept {
  const std::uint64_t* const hashes = moving_.hashes.data();
  std::uint32_t* const homes = moving_.homes.data();
  for (std::size_t i = 0; i < moving_.n; ++i) {
    const bool upper = high != 0 && (hashes[i] & side) != 0;
    homes[i] = bucket_index(hashes[i], upper ? high : low) + (upper ? kUpper : 0);
  }
}

void Index::replace(Segment* old, Segment* low, Segment* high, std::uint64_t hash, std::uint64_t side) noexcept {
  const std::uint32_t high_buckets = high == nullptr ? 0 : kBuckets[high->size_class];
  find_homes(kBuckets[low->size_class], high_buckets, side);
  // First those that find room at home, slot by slot: nobody sees these buckets yet.
  std::uint8_t taken[2 * kUpper] = {};
  std::size_t rest = 0;
  for (std::size_t i = 0; i < moving_.n; ++i) {
    const std::uint32_t home = moving_.homes[i];
    Segment* const to = home >= kUpper ? high : low;
    const std::size_t slot = taken[home];
    if (slot < Bucket::kSlots) {
      taken[home] = static_cast<std::uint8_t>(slot + 1);
      to->buckets()[home % kUpper].set(slot, moving_.keys[i], moving_.handles[i]);
    } else {
      moving_.homes[rest++] = static_cast<std::uint32_t>(i);
    }
  }
  for (std::size_t r = 0; r < rest; ++r) {
    const std::size_t i = moving_.homes[r];
    Segment* const to = high != nullptr && (moving_.hashes[i] & side) != 0 ? high : low;
    const Span at = span_in(to, kBuckets[to->size_class], moving_.hashes[i]);
    place_guest(at, {moving_.keys[i], moving_.handles[i]});
  }
  low->worn = false;  // where it is, no better layout was found: ids that were made to collide, perhaps
  if (high != nullptr) high->worn = false;
  link(low, high == nullptr ? hash : hash & ~side);
  if (high != nullptr) link(high, hash | side);
  // Only now, so that whoever finds a retired bucket finds its successor in the directory.
  for (std::uint32_t b = 0; b < kBuckets[old->size_class]; ++b) old->buckets()[b].retire();
  reclaimer_->retire(old, bytes(old->size_class));
  ++growths_;
}

void Index::link(Segment* segment, std::uint64_t hash) noexcept {
  Directory* const directory = directory_.load(std::memory_order_relaxed);
  const unsigned shift = directory->depth - segment->depth;
  const std::size_t first = directory->position(hash) >> shift << shift;
  for (std::size_t i = first; i < first + (std::size_t{1} << shift); ++i) {
    directory->entries()[i].store(entry_of(segment), std::memory_order_release);
  }
}

void Index::deepen() {
  Directory* const old = directory_.load(std::memory_order_relaxed);
  Directory* const deeper = make_directory(old->shard_bits, old->depth + 1);
  for (std::size_t i = 0; i < std::size_t{1} << old->depth; ++i) {
    const Entry entry = old->entries()[i].load(std::memory_order_relaxed);
    deeper->entries()[2 * i].store(entry, std::memory_order_relaxed);
    deeper->entries()[2 * i + 1].store(entry, std::memory_order_relaxed);
  }
  directory_.store(deeper, std::memory_order_release);
  reclaimer_->retire(old, directory_bytes(old->depth));
}

}  // namespace freshet
