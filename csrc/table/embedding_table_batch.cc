// What a writing batch consists of: its distinct ids, and what becomes of those that have no row.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "../common/parallel.h"
#include "batch.h"

namespace freshet {
namespace {

constexpr std::size_t kWorthThreads = 2048;  // ids below which a batch is not split
constexpr std::uint64_t kMostEvents = 0x7fffffff;  // more than a threshold or a row's count can be
constexpr double kTwoTo53 = 9007199254740992.0;

}  // namespace

void EmbeddingTable::Group::clear(std::size_t ids, std::size_t shards) {
  items.clear();
  items.reserve(ids);
  sums.clear();
  newcomers.clear();
  std::size_t room = 64;
  while (room < 3 * ids) room *= 2;  // a third full: most ids are told apart at the first look
  places.assign(room, 0);
  items_of_shard.assign(shards, 0);
}

void EmbeddingTable::Group::clear_positions(std::size_t ids, std::size_t shards) {
  positions.clear();
  positions.reserve(ids);
  items.clear();
  newcomers.clear();
  items_of_shard.assign(shards, 0);
}

FRESHET_INLINE EmbeddingTable::Item& EmbeddingTable::Group::item_of(std::int64_t id, std::uint64_t hash) {
  if (items.size() * 4 >= places.size() * 3) grow();
  const std::size_t mask = places.size() - 1;
  std::size_t at = static_cast<std::size_t>(hash >> 8) & mask;
  while (places[at] != 0) {
    Item& item = items[places[at] - 1];
    if (item.id == id) return item;
    at = (at + 1) & mask;
  }
  items.emplace_back(id);
  places[at] = static_cast<std::uint32_t>(items.size());
  return items.back();
}

void EmbeddingTable::Group::grow() {
  places.assign(2 * places.size(), 0);
  const std::size_t mask = places.size() - 1;
  for (std::size_t i = 0; i < items.size(); ++i) {
    std::size_t at = static_cast<std::size_t>(hash_id(items[i].id) >> 8) & mask;
    while (places[at] != 0) at = (at + 1) & mask;
    places[at] = static_cast<std::uint32_t>(i + 1);
  }
}

// How many groups a batch of n ids has.
void EmbeddingTable::set_groups(std::size_t n, std::size_t threads) {
  if (n > kNoSum / 2) throw std::invalid_argument("a batch may have at most 2^31 ids; split it");
  active_groups_ = n < kWorthThreads ? 1 : std::max<std::size_t>(1, std::min<std::size_t>(threads, config_.shards));
}

// Fills the groups with the distinct ids and the sums of their gradients, and makes room in the logs. No row is touched.
void EmbeddingTable::collect(const std::int64_t* ids, std::size_t n, const Gradients* gradients, Seconds now,
                             std::size_t threads) {
  set_groups(n, threads);
  parallel_for(active_groups_, threads, [&](std::size_t g) {
    Group& group = *groups_[g];
    group.clear(n / active_groups_ + 1, config_.shards);
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint64_t hash = hash_id(ids[i]);
      if (active_groups_ > 1 && shard_index(hash) % active_groups_ != g) continue;
      Item& item = group.item_of(ids[i], hash);
      const bool is_new = item.position == kNowhere;
      if (is_new) ++group.items_of_shard[shard_index(hash)];
      if (gradients == nullptr || is_new) item.position = static_cast<std::uint32_t>(i);
      if (gradients == nullptr) continue;
      add_events(item, *gradients, i, now);
      if (!is_new || gradients->scale != nullptr) add_gradient(group, item, *gradients, i, config_.dim);
    }
    group.newcomers.reserve(group.items.size());
    for (std::size_t s = 0; s < shards_.size(); ++s) {
      if (group.items_of_shard[s] != 0) shards_[s]->reserve_changes(epoch(), group.items_of_shard[s]);
    }
  });
}

// Makes room in the logs for marking the rows of ids[n] as seen, after the items that the first `groups` groups hold.
void EmbeddingTable::reserve_reads(const std::int64_t* ids, std::size_t n, std::size_t groups) {
  if (!config_.ttl_on_access || n == 0) return;
  std::vector<std::size_t> changes(shards_.size(), 0);
  for (std::size_t i = 0; i < n; ++i) ++changes[shard_index(hash_id(ids[i]))];
  for (std::size_t s = 0; s < shards_.size(); ++s) {
    if (changes[s] == 0) continue;
    for (std::size_t g = 0; g < groups; ++g) changes[s] += groups_[g]->items_of_shard[s];
    shards_[s]->reserve_changes(epoch(), changes[s]);
  }
}

void EmbeddingTable::add_events(Item& item, const Gradients& gradients, std::size_t i, Seconds now) noexcept {
  const bool counted = gradients.events != nullptr;
  const std::uint64_t events = counted ? gradients.events[i] : 1;
  if (events == 0) return;
  item.events = static_cast<std::uint32_t>(std::min<std::uint64_t>(item.events + events, kMostEvents));
  item.seen = std::max(item.seen, counted ? to_seconds(gradients.event_us[i]) : now);
}

// Adds the gradient of position i to the item's sum, which begins with that of the first occurrence.
void EmbeddingTable::add_gradient(Group& group, Item& item, const Gradients& gradients, std::size_t i, std::size_t dim) {
  if (item.sum == kNoSum) {
    item.sum = static_cast<std::uint32_t>(group.sums.size() / dim);
    group.sums.resize(group.sums.size() + dim, -0.0F);  // which added to leaves every number as it is, -0 too
    add_to_sum(gradients, item.position, dim, group.sums.data() + item.sum * dim);
    if (item.position == i) return;
  }
  add_to_sum(gradients, i, dim, group.sums.data() + item.sum * dim);
}

FRESHET_CLONES void EmbeddingTable::add_to_sum(const Gradients& gradients, std::size_t i, std::size_t dim,
                                               float* __restrict sum) noexcept {
  const float* const gradient = gradients.grads + (gradients.row != nullptr ? gradients.row[i] : i) * dim;
  const float by = gradients.scale != nullptr ? gradients.scale[i] : 1.0F;
  for (std::size_t j = 0; j < dim; ++j) sum[j] += by * gradient[j];
}

// Whether an id without a row gets one now. What is no event, a negative, makes a row only where each id has its row at
// once and for good: it would bring back what has expired.
Verdict EmbeddingTable::admit(const Item& item, const Newcomer& newcomer) const noexcept {
  if (item.events == 0) {
    return config_.admission == Admission::kAll && config_.ttl_us == 0 ? Verdict::kInsert : Verdict::kRefuse;
  }
  switch (config_.admission) {
    case Admission::kAll: return Verdict::kInsert;
    case Admission::kThreshold: {
      const std::uint32_t before = newcomer.was_candidate ? Candidate::from(newcomer.word).count : 0;
      return before + item.events >= config_.threshold ? Verdict::kInsert : Verdict::kCandidate;
    }
    case Admission::kProbability: {
      const std::uint64_t draw = mix64(mix64(init_key_ ^ hash_id(item.id)) + updates_ * kGolden);
      const double refused = power(1.0 - config_.probability, item.events);
      return static_cast<double>(draw >> 11) / kTwoTo53 < 1.0 - refused ? Verdict::kInsert : Verdict::kRefuse;
    }
  }
  return Verdict::kInsert;
}

// Verdicts by the admission, then by the room that is left, in the order of the batch, whatever the groups are. Returns
// how many ids find no room.
std::size_t EmbeddingTable::judge() {
  std::vector<std::pair<std::uint32_t, Newcomer*>> wanted;  // by position
  const bool bounded = config_.max_rows != 0 && config_.when_full == WhenFull::kRefuse;
  for (std::size_t g = 0; g < active_groups_; ++g) {
    for (Newcomer& newcomer : groups_[g]->newcomers) {
      const Item& item = groups_[g]->items[newcomer.item];
      newcomer.verdict = admit(item, newcomer);
      if (bounded && newcomer.verdict == Verdict::kInsert) wanted.emplace_back(item.position, &newcomer);
    }
  }
  const std::size_t room = config_.max_rows - std::min(config_.max_rows, size());
  if (wanted.size() <= room) return 0;
  std::sort(wanted.begin(), wanted.end());
  for (std::size_t i = room; i < wanted.size(); ++i) wanted[i].second->verdict = Verdict::kRefuse;
  return wanted.size() - room;
}

void EmbeddingTable::count_candidate(const Item& item, Newcomer& newcomer) {
  const std::uint64_t hash = hash_id(item.id);
  Shard& shard = shard_of(hash);
  keep_candidate(item.id, newcomer);
  const Candidate before = newcomer.was_candidate ? Candidate::from(newcomer.word) : Candidate{0, 0};
  const bool newer = !newcomer.was_candidate || (item.seen != 0 && !before.is_after(item.seen));
  const std::uint32_t hour = newer ? Candidate::hour_of(item.seen) : before.hour;
  const Index::Place place = newcomer.was_candidate ? shard.index().locate(item.id, hash) : Index::Place{nullptr, 0};
  shard.put_candidate(place, item.id, hash, Candidate{before.count + item.events, hour}.word());
  shard.dirty().note(item.id);
  newcomer.done = true;
}

void EmbeddingTable::keep_candidate(std::int64_t id, const Newcomer& newcomer) const noexcept {
  if (config_.admission != Admission::kThreshold) return;  // there are no candidates that a snapshot could miss
  SnapshotScan* const scan = snapshot_scan();
  if (scan == nullptr) return;
  if (newcomer.was_candidate) {
    scan->keep_candidate(id, newcomer.word);
  } else {
    scan->keep_no_candidate(id);
  }
}

void EmbeddingTable::roll_back() noexcept {
  for (const bool candidates : {false, true}) {
    for (std::size_t g = 0; g < active_groups_; ++g) {
      for (const Newcomer& newcomer : groups_[g]->newcomers) {
        if (newcomer.done && newcomer.was_candidate == candidates) undo(groups_[g]->items[newcomer.item].id, newcomer);
      }
    }
  }
}

void EmbeddingTable::undo(std::int64_t id, const Newcomer& newcomer) noexcept {
  const std::uint64_t hash = hash_id(id);
  Shard& shard = shard_of(hash);
  const Index::Place place = shard.index().locate(id, hash);
  if (!newcomer.was_candidate) {
    shard.remove(place, hash);
  } else if (newcomer.verdict == Verdict::kCandidate) {
    shard.put_candidate(place, id, hash, newcomer.word);
  } else {
    shard.demote(place, id, newcomer.word);
  }
}

}  // namespace freshet
