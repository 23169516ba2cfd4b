// The face is server/engine/loops.py. All of it runs under the interpreter's lock, on plain Python objects.
#include "sequences.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "arrays.h"
#include "bindings.h"

#ifdef Py_GIL_DISABLED
#error "These loops change Python objects without a lock of their own: build with a Python that has the GIL."
#endif

namespace millrace::bindings {
namespace {

enum RowField { kSequence, kStart, kEnd, kSamples, kSource };

// A new instance of a NamedTuple class. Takes over the references.
template <typename... Items>
py::object named_tuple(const py::object& type, Items... items) {
  auto* cls = reinterpret_cast<PyTypeObject*>(type.ptr());
  PyObject* made = cls->tp_alloc(cls, sizeof...(items));
  if (made == nullptr) throw py::error_already_set();
#if PY_VERSION_HEX >= 0x030E0000
  reinterpret_cast<PyTupleObject*>(made)->ob_hash = -1;  // not known yet
#endif
  Py_ssize_t at = 0;
  (PyTuple_SET_ITEM(made, at++, items), ...);
  return py::reinterpret_steal<py::object>(made);
}

PyObject* new_reference(PyObject* object) {
  Py_INCREF(object);
  return object;
}

class SequenceLoops {
 public:
  SequenceLoops(const py::object& sequence, const py::object& request, const py::object& row, const py::object& token,
                py::object running)
      : sequence_(sequence),
        request_type_(request),
        row_(row),
        token_(token),
        running_(std::move(running)),
        request_(sequence, "request"),
        tenant_(sequence, "tenant"),
        prompt_len_(sequence, "prompt_len"),
        limit_(sequence, "limit"),
        length_(sequence, "length"),
        status_(sequence, "status"),
        output_(sequence, "output"),
        scheduled_(sequence, "scheduled"),
        computed_(sequence, "computed"),
        capacity_(sequence, "capacity"),
        milestone_(sequence, "milestone"),
        stop_token_ids_(request, "stop_token_ids"),
        pending_(sequence, "pending"),
        in_flight_(sequence, "in_flight"),
        source_(sequence, "source"),
        lane_(sequence, "lane"),
        charged_(sequence, "charged"),
        sequence_id_(request, "sequence_id"),
        logprobs_top_n_(request, "logprobs_top_n") {}

  py::tuple sort_running(const py::list& running) const {
    py::list prefilling, decoding, growing;
    for (const py::handle item : running) {
      PyObject* sequence = checked(item.ptr());
      const long scheduled = scheduled_.number(sequence), length = length_.number(sequence);
      if (length - scheduled > 1) {
        prefilling.append(item);
      } else if (may_decode(item, length)) {
        decoding.append(item);
        if (scheduled == capacity_.number(sequence)) growing.append(item);
      }
    }
    return py::make_tuple(prefilling, decoding, growing);
  }

  py::tuple plan_decodes(long step, const py::list& decoding) const {
    py::list rows, unpaid;
    std::unordered_map<PyObject*, long> served;
    std::vector<PyObject*> tenants;  // in the order in which they come
    long attention = 0;
    for (const py::handle item : decoding) {
      PyObject* sequence = checked(item.ptr());
      const long end = length_.number(sequence), pending = pending_.number(sequence);
      PyObject* source = pending > 0 ? source_.get(sequence) : Py_None;
      const py::object row =
          named_tuple(row_, new_reference(sequence), Slot::number_object(end - 1), new_reference(length_.get(sequence)),
                      new_reference(Py_True), new_reference(source));
      source_.set(sequence, py::make_tuple(step, rows.size()).release().ptr());
      rows.append(row);
      attention += end;
      if (end > charged_.number(sequence)) {
        PyObject* tenant = tenant_.get(sequence);
        if (end <= prompt_len_.number(sequence)) {
          unpaid.append(py::reinterpret_borrow<py::object>(tenant));
        } else if (served[tenant]++ == 0) {
          tenants.push_back(tenant);
        }
        charged_.set(sequence, new_reference(length_.get(sequence)));
      }
      scheduled_.set(sequence, new_reference(length_.get(sequence)));
      in_flight_.set(sequence, in_flight_.number(sequence) + 1);
      pending_.set(sequence, pending + 1);
      length_.set(sequence, end + 1);
    }
    py::list outputs;
    for (PyObject* tenant : tenants) {
      outputs.append(py::make_tuple(py::reinterpret_borrow<py::object>(tenant), served[tenant]));
    }
    return py::make_tuple(rows, attention, unpaid, outputs);
  }

  py::tuple commit_plain(const py::list& rows, const py::list& tokens) const {
    if (rows.size() != tokens.size()) throw py::value_error("there must be a token for each row");
    py::list accepted, others;
    for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(rows.size()); ++i) {
      PyObject* row = PyList_GET_ITEM(rows.ptr(), i);
      PyObject* token = PyList_GET_ITEM(tokens.ptr(), i);
      PyObject* sequence = sequence_of(row);
      const long pending = pending_.number(sequence) - 1;
      if (!is_plain(sequence, row, token, pending)) {
        others.append(i);
        continue;
      }
      in_flight_.set(sequence, in_flight_.number(sequence) - 1);
      computed_.set(sequence, new_reference(PyTuple_GET_ITEM(row, kEnd)));
      pending_.set(sequence, pending);
      if (PyList_Append(output_.get(sequence), token) != 0) throw py::error_already_set();
      accepted.append(i);
    }
    return py::make_tuple(accepted, others);
  }

  // News of the accepted rows; None where log-probabilities were asked for.
  py::list tokens_of(const py::list& rows, const py::list& accepted, const py::list& tokens) const {
    py::list news;
    const py::tuple nothing;
    for (const py::handle index : accepted) {
      const auto i = index.cast<Py_ssize_t>();
      PyObject* request = request_of(sequence_of(item(rows, i)));
      if (logprobs_top_n_.get(request) != Py_None) {
        news.append(py::none());
        continue;
      }
      news.append(named_tuple(token_, new_reference(sequence_id_.get(request)), new_reference(item(tokens, i)),
                              new_reference(Py_None), new_reference(nothing.ptr()), new_reference(nothing.ptr())));
    }
    return news;
  }

  // Lanes and tokens of the accepted rows whose sequences still run, int32.
  py::tuple running_tokens(const py::list& rows, const py::list& accepted, const py::list& tokens) const {
    std::vector<std::int32_t> lanes, ids;
    for (const py::handle index : accepted) {
      const auto i = index.cast<Py_ssize_t>();
      PyObject* sequence = sequence_of(item(rows, i));
      if (status_.get(sequence) != running_.ptr()) continue;
      lanes.push_back(static_cast<std::int32_t>(lane_.number(sequence)));
      ids.push_back(static_cast<std::int32_t>(as_number(item(tokens, i))));
    }
    return py::make_tuple(vector_of(lanes), vector_of(ids));
  }

  // Lanes, starts, ends (int32), samples (bool) of rows, and (row, source) of those that wait for a token.
  py::tuple columns(const py::list& rows) const {
    const auto count = static_cast<py::ssize_t>(rows.size());
    py::array_t<std::int32_t> lanes(count), starts(count), ends(count);
    py::array_t<bool> samples(count);
    py::list sources;
    for (py::ssize_t i = 0; i < count; ++i) {
      PyObject* row = item(rows, i);
      lanes.mutable_data()[i] = static_cast<std::int32_t>(lane_.number(sequence_of(row)));
      starts.mutable_data()[i] = static_cast<std::int32_t>(as_number(PyTuple_GET_ITEM(row, kStart)));
      ends.mutable_data()[i] = static_cast<std::int32_t>(as_number(PyTuple_GET_ITEM(row, kEnd)));
      samples.mutable_data()[i] = PyTuple_GET_ITEM(row, kSamples) == Py_True;
      PyObject* source = PyTuple_GET_ITEM(row, kSource);
      if (source != Py_None) sources.append(py::make_tuple(i, py::reinterpret_borrow<py::object>(source)));
    }
    return py::make_tuple(lanes, starts, ends, samples, sources);
  }

 private:
  PyObject* checked(PyObject* object) const {
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(sequence_.ptr())) throw py::type_error("not a Sequence");
    return object;
  }

  PyObject* sequence_of(PyObject* row) const {
    if (Py_TYPE(row) != reinterpret_cast<PyTypeObject*>(row_.ptr())) throw py::type_error("not a Row");
    return checked(PyTuple_GET_ITEM(row, kSequence));
  }

  static PyObject* item(const py::list& list, Py_ssize_t index) {
    if (index < 0 || index >= static_cast<Py_ssize_t>(list.size())) throw py::index_error("no such row");
    return PyList_GET_ITEM(list.ptr(), index);
  }

  static long as_number(PyObject* object) {
    const long value = PyLong_AsLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  template <typename T>
  static py::array_t<T> vector_of(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
  }

  // Not beyond the end, and not past a token that sampling must know: a row can name only its last one.
  bool may_decode(py::handle sequence, long length) const {
    const long pending = pending_.number(sequence.ptr());
    if (pending == 0) return true;
    if (length >= limit_.number(sequence.ptr())) return false;
    return pending == 1 || !sequence.attr("needs_history").cast<bool>();
  }

  // It goes on, has a token, and nothing else is to be done about it.
  bool is_plain(PyObject* sequence, PyObject* row, PyObject* token, long pending) const {
    if (status_.get(sequence) != running_.ptr() || PyTuple_GET_ITEM(row, kSamples) != Py_True) return false;
    if (as_number(PyTuple_GET_ITEM(row, kEnd)) >= milestone_.number(sequence)) return false;
    if (pending == 0 && length_.number(sequence) == limit_.number(sequence)) return false;
    const int stops = PySet_Contains(stop_token_ids_.get(request_of(sequence)), token);
    if (stops < 0) throw py::error_already_set();
    return stops == 0;
  }

  PyObject* request_of(PyObject* sequence) const {
    PyObject* request = request_.get(sequence);
    if (Py_TYPE(request) != reinterpret_cast<PyTypeObject*>(request_type_.ptr())) {
      throw py::type_error("the request of a Sequence is not a SequenceRequest");
    }
    return request;
  }

  py::object sequence_, request_type_, row_, token_, running_;
  Slot request_, tenant_, prompt_len_, limit_, length_, status_, output_, scheduled_, computed_, capacity_, milestone_,
      stop_token_ids_, pending_, in_flight_, source_, lane_, charged_, sequence_id_, logprobs_top_n_;
};

}  // namespace

void bind_sequences(py::module_& module) {
  py::class_<SequenceLoops>(module, "SequenceLoops")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, py::object>())
      .def("sort_running", &SequenceLoops::sort_running)
      .def("plan_decodes", &SequenceLoops::plan_decodes)
      .def("commit_plain", &SequenceLoops::commit_plain)
      .def("tokens_of", &SequenceLoops::tokens_of)
      .def("running_tokens", &SequenceLoops::running_tokens)
      .def("columns", &SequenceLoops::columns);
}

}  // namespace millrace::bindings
