// CRC-32C (Castagnoli; RFC 3720, appendix B.4): finds damaged files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freshet {

// The checksum of `bytes` bytes that follow those whose checksum is `before` (0: there are none). The fastest way that
// this CPU offers.
std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t before = 0) noexcept;

// The same on any CPU.
std::uint32_t crc32c_portable(const void* data, std::size_t bytes, std::uint32_t before = 0) noexcept;

}  // namespace freshet
