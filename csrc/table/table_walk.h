// A walk over a table in order of hash, for its writer.
#pragma once

#include <algorithm>
#include <vector>

#include "embedding_table.h"

namespace freshet {

// Calls visit(key, hash, handle) for every row and candidate with from <= hash <= to; segments in order of hash. The
// visitor must not change the index.
template <typename Visit>
void EmbeddingTable::for_each_in(std::uint64_t from, std::uint64_t to, const Visit& visit) const {
  constexpr std::size_t kAhead = 16;  // bookkeeping on its way from memory
  std::vector<KeyHandle> entries;
  for (std::uint64_t at = from;;) {
    const Shard& shard = shard_of(at);
    entries.clear();
    const std::uint64_t last = shard.index().list_segment(at, &entries);
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (i + kAhead < entries.size() && is_row(entries[i + kAhead].handle)) {
        prefetch<Intent::kRead>(&shard.meta(entries[i + kAhead].handle));
      }
      const std::uint64_t hash = hash_id(entries[i].key);
      if (hash >= from && hash <= to) visit(entries[i].key, hash, entries[i].handle);
    }
    if (last >= to) return;
    at = last + 1;
  }
}

}  // namespace freshet
