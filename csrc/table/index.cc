#include "index.h"

#include <algorithm>
#include <new>

namespace freshet {

Index::Index(Reclaimer* reclaimer, unsigned bits) : reclaimer_(reclaimer), directory_(make_directory(bits, 0)) {
  try {
    directory_.load()->entries()[0].store(entry_of(make_segment(0, 0)));
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

Index::Segment* Index::make_segment(std::uint32_t size_class, unsigned depth) {
  auto* const segment = static_cast<Segment*>(reclaimer_->arena().allocate(bytes(size_class)));
  segment->size_class = size_class;
  segment->depth = depth;
  segment->used = 0;
  for (std::uint32_t b = 0; b < kBuckets[size_class]; ++b) (new (segment->buckets() + b) Bucket)->clear();
  return segment;
}

Index::Directory* Index::make_directory(unsigned shard_bits, unsigned depth) {
  auto* const directory = static_cast<Directory*>(reclaimer_->arena().allocate(directory_bytes(depth)));
  directory->shard_bits = shard_bits;
  directory->depth = depth;
  for (std::size_t i = 0; i < std::size_t{1} << depth; ++i) new (directory->entries() + i) std::atomic<Entry>(0);
  return directory;
}

Index::Found Index::find(std::int64_t key, std::uint64_t hash) const noexcept {
  for (Span at = span(hash);;) {
    const Bucket& bucket = *at.bucket;
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
    bool retired = false;
    for (std::uint32_t b = 0; b < kBuckets[entry & kClassMask] && !retired; ++b) {
      const Bucket& bucket = segment_of(entry)->buckets()[b];
      const std::size_t start = entries->size();
      for (;;) {
        const std::uint32_t control = bucket.begin_read();
        retired = Bucket::retired(control);
        for (std::size_t slot = 0; slot < Bucket::kSlots; ++slot) {
          const Handle handle = bucket.at(slot);
          if (handle != kAbsent) entries->push_back({bucket.key[slot].load(std::memory_order_relaxed), handle});
        }
        if (bucket.end_read(control)) break;
        entries->resize(start);
      }
    }
    if (retired) continue;  // the directory names its successor already
    const unsigned prefix = directory->shard_bits + segment_of(entry)->depth;
    return prefix == 0 ? ~std::uint64_t{0} : at | (~std::uint64_t{0} >> prefix);
  }
}

Index::Place Index::place_in(Segment* segment, std::int64_t key, std::uint64_t hash, Handle handle) noexcept {
  const std::uint32_t buckets = kBuckets[segment->size_class];
  std::size_t b = bucket_index(hash, buckets);
  for (;;) {  // ends: a segment is never full
    Bucket& bucket = segment->buckets()[b];
    const BucketLock lock(bucket);
    const std::size_t empty = bucket.slot_of(kAbsent);
    if (empty != Bucket::kSlots) {
      bucket.set(empty, key, handle);
      ++segment->used;
      return {&bucket, empty};
    }
    bucket.count_overflow();
    b = b + 1 == buckets ? 0 : b + 1;
  }
}

Index::Place Index::insert(std::int64_t key, std::uint64_t hash, Handle handle) {
  Segment* segment = segment_of(entry_at(hash));
  while (segment->used >= limit(segment->size_class)) {  // more than once only if all keys of a split fall on one side
    grow(segment, hash);
    segment = segment_of(entry_at(hash));
  }
  const Place place = place_in(segment, key, hash, handle);
  set_size(size() + 1);
  return place;
}

void Index::erase(Place place, std::uint64_t hash) noexcept {
  Segment* const segment = segment_of(entry_at(hash));
  const std::uint32_t buckets = kBuckets[segment->size_class];
  for (std::size_t b = bucket_index(hash, buckets); segment->buckets() + b != place.bucket;
       b = b + 1 == buckets ? 0 : b + 1) {
    const BucketLock lock(segment->buckets()[b]);
    segment->buckets()[b].uncount_overflow();
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
  while (size_class < kLastClass && limit(size_class) * 19 / 20 < keys) ++size_class;
  return size_class;
}

void Index::grow(Segment* old, std::uint64_t hash) {
  reclaimer_->reserve(2);
  const bool split = old->size_class == kLastClass;
  if (split && old->depth == directory_.load(std::memory_order_relaxed)->depth) deepen();
  moving_.clear();
  list_segment(hash, &moving_);
  hashes_.resize(moving_.size());
  const unsigned shard_bits = directory_.load(std::memory_order_relaxed)->shard_bits;
  const std::uint64_t side = std::uint64_t{1} << (63 - shard_bits - old->depth);  // the bit that tells the halves apart
  std::size_t upper = 0;
  for (std::size_t i = 0; i < moving_.size(); ++i) {
    hashes_[i] = hash_id(moving_[i].key);
    upper += (hashes_[i] & side) != 0 ? 1 : 0;
  }
  if (!split) {
    replace(old, make_segment(old->size_class + 1, old->depth), nullptr, hash, side);
    return;
  }
  const std::uint32_t low_class = class_for(moving_.size() - upper);
  Segment* const low = make_segment(low_class, old->depth + 1);
  try {
    replace(old, low, make_segment(class_for(upper), old->depth + 1), hash, side);
  } catch (...) {
    release(low, bytes(low_class));
    throw;
  }
}

void Index::replace(Segment* old, Segment* low, Segment* high, std::uint64_t hash, std::uint64_t side) noexcept {
  for (std::size_t i = 0; i < moving_.size(); ++i) {
    place_in(high != nullptr && (hashes_[i] & side) != 0 ? high : low, moving_[i].key, hashes_[i], moving_[i].handle);
  }
  link(low, high == nullptr ? hash : hash & ~side);
  if (high != nullptr) link(high, hash | side);
  // Only now, so that whoever finds a retired bucket finds its successor in the directory.
  for (std::uint32_t b = 0; b < kBuckets[old->size_class]; ++b) old->buckets()[b].retire();
  reclaimer_->retire(old, bytes(old->size_class));
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
