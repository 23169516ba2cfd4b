// Fields of Python objects whose class has __slots__, read and written in place: attribute access without a lookup.
#pragma once

#include <pybind11/pybind11.h>
#include <structmember.h>

#include <string>

namespace millrace::bindings {

namespace py = pybind11;

class Slot {
 public:
  Slot(const py::object& type, const char* name) : offset_(offset_of(type, name)) {}

  // Borrowed.
  PyObject* get(PyObject* object) const { return *place(object); }

  // Takes over a reference.
  void set(PyObject* object, PyObject* value) const {
    PyObject* old = *place(object);
    *place(object) = value;
    Py_XDECREF(old);
  }

  long number(PyObject* object) const {
    const long value = PyLong_AsLong(get(object));
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  void set(PyObject* object, long value) const { set(object, number_object(value)); }

  static PyObject* number_object(long value) {
    PyObject* object = PyLong_FromLong(value);
    if (object == nullptr) throw py::error_already_set();
    return object;
  }

 private:
  static Py_ssize_t offset_of(const py::object& type, const char* name) {
    const py::object member = type.attr(name);
    if (Py_TYPE(member.ptr()) != &PyMemberDescr_Type) {
      throw py::type_error(std::string(py::str(type)) + " has no slot " + name);
    }
    return reinterpret_cast<PyMemberDescrObject*>(member.ptr())->d_member->offset;
  }

  PyObject** place(PyObject* object) const {
    return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

  Py_ssize_t offset_;
};

}  // namespace millrace::bindings
