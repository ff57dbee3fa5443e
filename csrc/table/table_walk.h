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
  constexpr std::size_t kAhead = 16;  // keys on their way from memory
  std::vector<Handle> handles;
  for (std::uint64_t at = from;;) {
    const Shard& shard = shard_of(at);
    handles.clear();
    const std::uint64_t last = shard.index().list_segment(at, &handles);
    for (std::size_t i = 0; i < handles.size(); ++i) {
      if (i + kAhead < handles.size() && is_row(handles[i + kAhead])) prefetch_read(&shard.meta(handles[i + kAhead]));
      const std::int64_t key = shard.index().key_of(handles[i]);
      const std::uint64_t hash = hash_id(key);
      if (hash >= from && hash <= to) visit(key, hash, handles[i]);
    }
    if (last >= to) return;
    at = last + 1;
  }
}

}  // namespace freshet
