// What the parts of the Python module share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace freshet {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Ids = Array<std::int64_t>;
using Floats = Array<float>;
using Release = py::gil_scoped_release;

// Hands a vector to numpy without copying it.
template <typename T>
Array<T> to_numpy(std::vector<T> values, std::vector<py::ssize_t> shape) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  py::capsule free(owner.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owner.release();
  return Array<T>(std::move(shape), data, free);
}

template <typename T>
std::size_t length(const Array<T>& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one dimension");
  return static_cast<std::size_t>(array.shape(0));
}

inline void check_shape(const Floats& values, std::size_t n, std::size_t width, const char* name) {
  if (values.ndim() != 2 || static_cast<std::size_t>(values.shape(0)) != n ||
      static_cast<std::size_t>(values.shape(1)) != width) {
    throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(n) + ", " +
                                std::to_string(width) + "]");
  }
}

void bind_snapshot(py::module_& m);
void bind_checksum(py::module_& m);
void bind_serving(py::module_& m);

}  // namespace freshet
