// What snapshot files need, in the Python module: checksums and virtual buckets.
#include <cstdint>

#include "bindings.h"
#include "checksum.h"
#include "hash.h"

namespace freshet {
namespace {

// The bytes of a C-contiguous buffer, held for as long as this lives.
class Bytes {
 public:
  explicit Bytes(const py::object& source) {
    if (PyObject_GetBuffer(source.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  const void* data() const noexcept { return view_.buf; }
  std::size_t size() const noexcept { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

std::uint32_t checksum(const py::object& data, std::uint32_t seed) {
  const Bytes bytes(data);
  const Release release;
  return crc32c(bytes.data(), bytes.size(), seed);
}

Array<std::uint16_t> virtual_buckets(const Ids& ids) {
  const std::size_t n = length(ids, "ids");
  Array<std::uint16_t> buckets(static_cast<py::ssize_t>(n));
  const std::int64_t* in = ids.data();
  std::uint16_t* out = buckets.mutable_data();
  const Release release;
  for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<std::uint16_t>(virtual_bucket(hash_id(in[i])));
  return buckets;
}

}  // namespace

void bind_checksum(py::module_& m) {
  m.attr("VIRTUAL_BUCKETS") = 1U << kVirtualBucketBits;
  m.def("crc32c", &checksum, py::arg("data"), py::arg("seed") = 0);
  m.def("virtual_buckets", &virtual_buckets, py::arg("ids").noconvert());
}

}  // namespace freshet
