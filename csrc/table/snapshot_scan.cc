#include "snapshot_scan.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <limits>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "table_walk.h"

namespace freshet {
namespace {

constexpr std::size_t kRowsAhead = 8;
constexpr double kRest = 4.0, kLongestRest = 0.25;  // times the work; seconds
constexpr std::uint16_t kLastNumber = std::numeric_limits<std::uint16_t>::max();
constexpr std::uint64_t kLastHash = std::numeric_limits<std::uint64_t>::max();

}  // namespace

void Block::clear() {
  keys.clear();
  weights.clear();
  state.clear();
  last_seen.clear();
  dirty_epoch.clear();
  counts.clear();
  candidate_keys.clear();
  candidates.clear();
}

void Block::reserve(std::size_t rows, std::size_t dim, std::size_t state_dim) {
  keys.reserve(rows);
  weights.reserve(rows * dim);
  state.reserve(rows * state_dim);
  last_seen.reserve(rows);
  dirty_epoch.reserve(rows);
  counts.reserve(rows);
}

std::size_t Block::bytes() const noexcept {
  return (weights.size() + state.size() + last_seen.size() + dirty_epoch.size() + candidates.size()) * 4 +
         (keys.size() + candidate_keys.size()) * 8 + counts.size() * 2;
}

namespace {

// Without the zeros that resize would write first.
void append_racy(const float* floats, std::size_t n, std::vector<float>* to) {
#if FRESHET_TSAN
  std::vector<float> copy(n);
  copy_racy(floats, n * sizeof(float), copy.data());
  to->insert(to->end(), copy.begin(), copy.end());
#else
  to->insert(to->end(), floats, floats + n);
#endif
}

}  // namespace

void SnapshotScan::add(Block* block, std::int64_t key, const float* floats, const RowMeta& meta) const {
  block->keys.push_back(key);
  append_racy(floats, table_.config_.dim, &block->weights);
  append_racy(floats + table_.config_.dim, table_.state_dim_, &block->state);
  block->last_seen.push_back(meta.last_seen.load(std::memory_order_relaxed));
  block->dirty_epoch.push_back(meta.dirty_epoch.load(std::memory_order_relaxed));
  block->counts.push_back(meta.count.load(std::memory_order_relaxed));
}

// Takes back the row that was added last.
void SnapshotScan::drop_last(Block* block) const {
  block->keys.pop_back();
  block->weights.resize(block->keys.size() * table_.config_.dim);
  block->state.resize(block->keys.size() * table_.state_dim_);
  block->last_seen.pop_back();
  block->dirty_epoch.pop_back();
  block->counts.pop_back();
}

SnapshotScan::SnapshotScan(EmbeddingTable& table) : table_(table) {
  const std::lock_guard<std::mutex> lock(table.write_mutex_);
  if (table.snapshot_scan() != nullptr) throw std::runtime_error("another snapshot of this table is being taken; wait for it");
  if (table.snapshots_ == kLastNumber) {  // they come again: rows that scans which ended early never claimed may have them
    const Reclaimer::Guard guard(table.reclaimer_);
    table.for_each_in(0, kLastHash, [&](std::int64_t, std::uint64_t hash, Handle handle) {
      if (is_row(handle)) table.shard_of(hash).meta(handle).saved.store(0, std::memory_order_relaxed);
    });
    table.snapshots_ = 0;
  }
  number_ = ++table.snapshots_;
  progress_ = {table.epoch(), table.updates_, table.sweep_at_, table.eviction_at_, table.clock_};
  dropped_to_ = table.dropped_to_;
  rows_ = table.size();
  writes_ = table.writes_.load(std::memory_order_relaxed);
  rested_at_ = std::chrono::steady_clock::now();
  for (const auto& shard : table.shards_) {
    shard->tombstones().for_each_after(0, [&](std::int64_t key, Epoch epoch) {
      tombstone_keys_.push_back(key);
      tombstone_epochs_.push_back(epoch);
    });
  }
  table.snapshot_.store(this, std::memory_order_relaxed);
}

SnapshotScan::~SnapshotScan() {
  const std::lock_guard<std::mutex> lock(table_.write_mutex_);
  table_.snapshot_.store(nullptr, std::memory_order_relaxed);
}

void SnapshotScan::keep_row(std::int64_t key, const float* floats, RowMeta& meta, Block* block) noexcept {
  std::uint16_t before = meta.saved.load(std::memory_order_relaxed);
  if (before == number_ || !meta.saved.compare_exchange_strong(before, number_, std::memory_order_acq_rel)) return;
  if (gave_up_) return;
  try {
    if (block->keys.size() == rows_per_block()) give_back(block);
    if (block->keys.capacity() == 0) take_open(block);
    add(block, key, floats, meta);
  } catch (const std::bad_alloc&) {
    gave_up_ = true;  // training goes on; `next` reports it
  }
}

// The block of an earlier batch that is not full yet, or an empty one, of rows from any bucket.
void SnapshotScan::take_open(Block* block) {
  {
    const std::lock_guard<std::mutex> lock(saved_mutex_);
    for (std::vector<Block>* from : {&open_, &spare_}) {
      if (from->empty()) continue;
      std::swap(*block, from->back());
      from->pop_back();
      break;
    }
  }
  block->first_bucket = 0;
  block->last_bucket = virtual_bucket(kLastHash);
  block->reserve(rows_per_block(), table_.config_.dim, table_.state_dim_);
}

void SnapshotScan::give_back(Block* block) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(saved_mutex_);
    if (block->keys.size() == rows_per_block()) {
      saved_.emplace_back(std::move(*block));
    } else {
      open_.emplace_back(std::move(*block));
    }
    *block = Block();
  } catch (const std::bad_alloc&) {
    gave_up_ = true;
  }
}

void SnapshotScan::keep_word(std::int64_t key, std::uint64_t word) noexcept {
  const bool passed = hash_id(key) < at_.load(std::memory_order_acquire) || scanned_.load(std::memory_order_relaxed);
  if (passed) return;  // the scan has it, or has seen that it was none
  try {
    const std::lock_guard<std::mutex> lock(saved_mutex_);
    saved_candidates_.emplace(key, word);  // the first word stays: it is the one of the moment
  } catch (const std::bad_alloc&) {
    gave_up_ = true;
  }
}

double SnapshotScan::rest_after(double worked, bool changed) noexcept {
  return changed ? std::min(kRest * worked, kLongestRest) : 0.0;
}

void SnapshotScan::give_way() {
  using Clock = std::chrono::steady_clock;
  using Span = std::chrono::duration<double>;
  const bool changed = table_.writes_.load(std::memory_order_relaxed) != writes_;
  std::this_thread::sleep_for(Span(rest_after(Span(Clock::now() - rested_at_).count(), changed)));
  writes_ = table_.writes_.load(std::memory_order_relaxed);
  rested_at_ = Clock::now();
}

bool SnapshotScan::next(Block* block) {
  block->clear();
  if (scanned_ && !settled_) {
    const std::lock_guard<std::mutex> writing(table_.write_mutex_);  // a batch under way gives back what it has kept
    settled_ = true;
  }
  if (gave_up_) {
    throw std::runtime_error("no memory was left to keep rows that training changed; free some and take it again");
  }
  {
    const std::lock_guard<std::mutex> lock(saved_mutex_);
    if (scanned_) {  // then the blocks that are not full, too
      std::move(open_.begin(), open_.end(), std::back_inserter(saved_));
      open_.clear();
    }
    if (!saved_.empty()) {  // handed on as it is: nothing is copied under the lock
      spare_.reserve(spare_.size() + 1);
      std::swap(*block, saved_.front());
      spare_.push_back(std::move(saved_.front()));
      saved_.pop_front();
      return true;
    }
  }
  if (scanned_) return next_candidates(block);
  block->first_bucket = virtual_bucket(at_);
  while (!scanned_ && block->bytes() < kBlockBytes) scan_segment(block);
  block->last_bucket = scanned_ ? virtual_bucket(kLastHash) : virtual_bucket(at_ - 1);
  return true;
}

// Candidates that changed during the scan, as they were; the last block.
bool SnapshotScan::next_candidates(Block* block) {
  const std::lock_guard<std::mutex> lock(saved_mutex_);
  if (ended_) return false;
  ended_ = true;
  block->first_bucket = 0;
  block->last_bucket = virtual_bucket(kLastHash);
  for (const auto& [key, word] : saved_candidates_) {
    if (word == kNone) continue;
    block->candidate_keys.push_back(key);
    block->candidates.push_back(static_cast<std::uint32_t>(word));
  }
  return true;
}

void SnapshotScan::scan_segment(Block* block) {
  const Reclaimer::Guard guard(table_.reclaimer_);
  const Shard& shard = table_.shard_of(at_);
  entries_.clear();
  const std::uint64_t last = shard.index().list_segment(at_, &entries_);
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (i + kRowsAhead < entries_.size() && is_row(entries_[i + kRowsAhead].handle)) {
      prefetch<Intent::kRead>(&shard.meta(entries_[i + kRowsAhead].handle));
      prefetch_row(shard.floats(entries_[i + kRowsAhead].handle), table_.float_bytes());
    }
    if (is_row(entries_[i].handle)) {
      claim_row(block, shard, entries_[i]);
    } else {
      copy_candidate(block, shard, entries_[i]);
    }
  }
  scanned_.store(last == kLastHash, std::memory_order_relaxed);
  at_.store(last + 1, std::memory_order_release);  // after the last hash 0, which tells a writer nothing: scanned_ does
}

// Copies the row and claims it; the writer, who claims before it changes a row, may have been first. A row that was
// given to another key meanwhile has this snapshot's number from then on.
void SnapshotScan::claim_row(Block* block, const Shard& shard, KeyHandle entry) const {
  RowMeta& meta = shard.meta(entry.handle);
  for (;;) {
    const Index::Found found = shard.index().find(entry.key, hash_id(entry.key));
    std::uint16_t before = meta.saved.load(std::memory_order_acquire);
    if (before == number_) return;
    if (found.handle != entry.handle) {
      if (found.bucket->end_read(found.control)) return;  // gone: the writer has saved it
      continue;
    }
    add(block, entry.key, shard.floats(entry.handle), meta);
    if (found.bucket->end_read(found.control) &&
        meta.saved.compare_exchange_strong(before, number_, std::memory_order_acq_rel)) {
      return;
    }
    drop_last(block);
  }
}

// A candidate that changes comes with next_candidates, as it was.
void SnapshotScan::copy_candidate(Block* block, const Shard& shard, KeyHandle entry) {
  const CandidateRecord& record = shard.candidate(entry.handle);
  for (;;) {
    const Index::Found found = shard.index().find(entry.key, hash_id(entry.key));
    const std::uint32_t word = record.word.load(std::memory_order_relaxed);
    if (!found.bucket->end_read(found.control)) continue;
    if (found.handle != entry.handle) return;  // gone: the writer has saved it
    const std::lock_guard<std::mutex> lock(saved_mutex_);
    if (saved_candidates_.count(entry.key) != 0) return;
    block->candidate_keys.push_back(entry.key);
    block->candidates.push_back(word);
    return;
  }
}

}  // namespace freshet
