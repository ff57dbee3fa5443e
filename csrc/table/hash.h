// Hashes of ids. They decide where a row lies and what it starts from, never which id it belongs to.
#pragma once

#include <cstdint>

namespace freshet {

inline constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ULL;  // splitmix64's increment

// The splitmix64 finaliser: a bijection of 64-bit words, so distinct ids keep distinct hashes.
inline constexpr std::uint64_t mix64(std::uint64_t x) noexcept {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// The same for every table: its top bits are the virtual bucket of a snapshot and the shard, its low bits the bucket.
inline constexpr std::uint64_t hash_id(std::int64_t id) noexcept {
  return mix64(static_cast<std::uint64_t>(id) + kGolden);
}

inline constexpr std::uint64_t table_key(std::uint64_t seed, std::uint64_t slot_hash) noexcept {
  return mix64(mix64(seed + kGolden) ^ slot_hash);
}

inline constexpr unsigned kVirtualBucketBits = 10;
inline constexpr std::uint32_t virtual_bucket(std::uint64_t hash) noexcept {
  return static_cast<std::uint32_t>(hash >> (64 - kVirtualBucketBits));
}

}  // namespace freshet
