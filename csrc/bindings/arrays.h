// Arguments of the native kernels: checked here, so that the kernels need not.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "millrace/isa.h"

namespace millrace::bindings {

namespace py = pybind11;

[[noreturn]] inline void fail(const std::string& message) { throw py::value_error(message); }

// The fastest of this machine, or MILLRACE_ISA.
Isa current_isa();

// A contiguous vector of T; `length` -1: any.
template <typename T>
const T* column(const py::array& array, const char* name, py::ssize_t length) {
  const std::string is = std::string(name) + " must be ";
  if (!array.dtype().equal(py::dtype::of<T>())) {
    fail(is + std::string(py::str(py::dtype::of<T>())) + ", not " + std::string(py::str(array.dtype())));
  }
  if (array.ndim() != 1) fail(is + "one-dimensional");
  if (length >= 0 && array.shape(0) != length) {
    fail(is + std::to_string(length) + " long, not " + std::to_string(array.shape(0)));
  }
  if ((array.flags() & py::array::c_style) == 0) fail(is + "contiguous");
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) fail(is + "aligned");
  return static_cast<const T*>(array.data());
}

// A contiguous [rows, size] of T, 1 <= size < 2^31.
template <typename T>
struct Rows {
  T* data;
  std::int32_t rows, size;

  T* row(std::int32_t i) const { return data + std::int64_t{i} * size; }
};

template <typename T>
Rows<T> rows_of(const py::array& array, const char* name, bool written) {
  const std::string is = std::string(name) + " must be ";
  if (!array.dtype().equal(py::dtype::of<T>())) {
    fail(is + std::string(py::str(py::dtype::of<T>())) + ", not " + std::string(py::str(array.dtype())));
  }
  constexpr py::ssize_t kMost = 0x7fffffff;
  if (array.ndim() != 2 || array.shape(0) > kMost || array.shape(1) < 1 || array.shape(1) > kMost) {
    fail(is + "[rows, size] with size at least 1");
  }
  if ((array.flags() & py::array::c_style) == 0) fail(is + "contiguous");
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) fail(is + "aligned");
  if (written && !array.writeable()) fail(is + "writeable");
  return {static_cast<T*>(const_cast<void*>(array.data())), static_cast<std::int32_t>(array.shape(0)),
          static_cast<std::int32_t>(array.shape(1))};
}

template <typename T, typename Predicate>
const T* checked(const py::array& array, const char* name, py::ssize_t length, const char* range, Predicate inside) {
  const T* values = column<T>(array, name, length);
  for (py::ssize_t i = 0; i < array.shape(0); ++i) {
    if (!inside(values[i])) {
      fail(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(values[i]) + " is outside " + range);
    }
  }
  return values;
}

inline const std::int32_t* offsets(const py::array& array, const char* name, py::ssize_t rows, py::ssize_t end) {
  const auto* values = column<std::int32_t>(array, name, rows + 1);
  bool valid = values[0] == 0 && values[rows] == end;
  for (py::ssize_t i = 0; i < rows; ++i) valid = valid && values[i] <= values[i + 1];
  if (!valid) fail(std::string(name) + " must rise from 0 to " + std::to_string(end));
  return values;
}

}  // namespace millrace::bindings
