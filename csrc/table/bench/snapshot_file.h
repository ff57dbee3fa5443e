// A snapshot as one plain file of blocks: what writing and reading costs without checksums and manifest.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../snapshot_scan.h"

namespace bench {

// Closes itself; every failure is a std::runtime_error with the name of the file.
class File {
 public:
  File(const std::string& name, int flags) : name_(name), file_(open(name.c_str(), flags | O_CLOEXEC, 0644)) {
    if (file_ < 0) fail();
  }
  ~File() { close(file_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void write_all(const void* from, std::size_t bytes) {
    for (const char* at = static_cast<const char*>(from); bytes != 0;) {
      const ssize_t done = write(file_, at, bytes);
      if (done < 0) fail();
      at += done;
      bytes -= static_cast<std::size_t>(done);
    }
  }

  // Returns the bytes read, fewer only at the end of the file.
  std::size_t read_some(void* to, std::size_t bytes) {
    std::size_t total = 0;
    while (total < bytes) {
      const ssize_t done = read(file_, static_cast<char*>(to) + total, bytes - total);
      if (done < 0) fail();
      if (done == 0) break;
      total += static_cast<std::size_t>(done);
    }
    return total;
  }

 private:
  [[noreturn]] void fail() const { throw std::runtime_error(name_ + ": " + std::strerror(errno)); }

  std::string name_;
  int file_;
};

template <typename T>
void write_column(File& file, const std::vector<T>& column) {
  file.write_all(column.data(), column.size() * sizeof(T));
}

template <typename T>
void read_column(File& file, std::size_t n, std::vector<T>* column) {
  column->resize(n);
  const std::size_t bytes = n * sizeof(T);
  if (file.read_some(column->data(), bytes) != bytes) throw std::runtime_error("snapshot file is cut short");
}

// Runs the scan to its end; returns the bytes written.
inline std::size_t write_snapshot(freshet::EmbeddingTable& table, const std::string& name) {
  freshet::SnapshotScan scan(table);
  File file(name, O_WRONLY | O_CREAT | O_TRUNC);
  freshet::Block block;
  std::size_t bytes = 0;
  while (scan.next(&block)) {
    const std::uint64_t rows = block.keys.size();
    file.write_all(&rows, sizeof rows);
    write_column(file, block.keys);
    write_column(file, block.weights);
    write_column(file, block.state);
    write_column(file, block.last_seen);
    write_column(file, block.counts);
    bytes += sizeof rows + rows * (14 + sizeof(float) * (table.dim() + table.state_dim()));
    scan.give_way();
  }
  return bytes;
}

// Fills an empty table from the file, by upsert.
inline void restore_snapshot(const std::string& name, freshet::EmbeddingTable& table) {
  File file(name, O_RDONLY);
  freshet::Block block;
  std::vector<std::int64_t> last_update_us;
  std::uint64_t rows = 0;
  while (file.read_some(&rows, sizeof rows) == sizeof rows) {
    read_column(file, rows, &block.keys);
    read_column(file, rows * table.dim(), &block.weights);
    read_column(file, rows * table.state_dim(), &block.state);
    read_column(file, rows, &block.last_seen);
    read_column(file, rows, &block.counts);
    last_update_us.resize(rows);
    for (std::size_t i = 0; i < rows; ++i) last_update_us[i] = freshet::to_microseconds(block.last_seen[i]);
    table.upsert(block.keys.data(), rows,
                 {block.weights.data(), block.state.data(), last_update_us.data(), block.counts.data()}, 1);
  }
}

inline void copy_file(const std::string& from, const std::string& to) {
  File source(from, O_RDONLY);
  File target(to, O_WRONLY | O_CREAT | O_TRUNC);
  std::vector<char> buffer(std::size_t{1} << 20);
  while (const std::size_t bytes = source.read_some(buffer.data(), buffer.size())) {
    target.write_all(buffer.data(), bytes);
  }
}

}  // namespace bench
