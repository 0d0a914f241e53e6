// Masks whose structure is noted in Python (`tilebook.kernels.attention.structure`), where PyTorch's attention meets them.
//
// A note is in a table of Python's, by the address of the mask's object. Who is asked whether there is one has no lock to
// wait for where calls are small, or nothing is noted.

#include "shared.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/core/grad_mode.h>

#include <atomic>

namespace noting {
namespace {

std::atomic<bool> on{false};
std::atomic<double> bounds[2];                    // q times keys up to which no note is looked at: without gradients, with
PyObject *table = nullptr, *answering = nullptr;  // under the GIL

// Is what such a call computes more than the bound?
bool large(const at::Tensor& q, const at::Tensor& k) {
  const auto numbers = q.sym_numel().maybe_as_int(), keys = k.sym_size(-2).maybe_as_int();
  return numbers && keys && static_cast<double>(*numbers) * static_cast<double>(*keys) > bounds[at::GradMode::is_enabled()].load();
}

bool there(PyObject* mask) {
  if (!table || !PyDict_GET_SIZE(table)) return false;
  PyObject* const address = PyLong_FromVoidPtr(mask);
  const int found = address ? PyDict_Contains(table, address) : -1;
  Py_XDECREF(address);
  if (found < 0) PyErr_Clear();
  return found > 0;
}

struct Held {
  PyObject* const object;
  explicit Held(PyObject* object) : object(object) {}
  ~Held() { Py_XDECREF(object); }
};

PyObject* notes(PyObject*, PyObject* given) {
  PyObject *held, *function;
  double forward, training;
  if (!PyArg_ParseTuple(given, "O!O(dd)", &PyDict_Type, &held, &function, &forward, &training)) return nullptr;
  Py_INCREF(held);
  Py_INCREF(function);
  Py_XSETREF(table, held);
  Py_XSETREF(answering, function);
  bounds[0] = forward;
  bounds[1] = training;
  Py_RETURN_NONE;
}

at::Tensor asked(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
                 std::optional<double> scale, bool grouped) {
  if (!on.load(std::memory_order_relaxed) || mask.scalar_type() != at::kBool || !large(q, k)) return {};
  const auto kind = served_kind();
  for (const at::Tensor* each : {&q, &k, &v, &mask}) {
    if (each->device().type() != kind || !ordinary(*each, kind)) return {};
  }
  const Gil gil;
  const Held of(THPVariable_Wrap(mask));
  if (!of.object) PyErr_Clear();
  if (!of.object || !there(of.object)) return {};
  const Held first(THPVariable_Wrap(q)), second(THPVariable_Wrap(k)), third(THPVariable_Wrap(v));
  const Held factor(scale ? PyFloat_FromDouble(*scale) : Py_NewRef(Py_None));
  PyObject* const flag = grouped ? Py_True : Py_False;
  const Held answer(staying([&] {
    return PyObject_CallFunctionObjArgs(answering, first.object, second.object, third.object, of.object, factor.object,
                                        flag, nullptr);
  }));
  if (!answer.object) {
    python_error raised;
    raised.persist();
    throw raised;
  }
  return THPVariable_Check(answer.object) ? THPVariable_Unpack(answer.object) : at::Tensor();
}

}  // namespace
}  // namespace noting

void notes_on(bool now) { noting::on = now; }

bool noted(PyObject* mask, const at::Tensor& q, const at::Tensor& k) {
  return noting::large(q, k) && noting::there(mask);
}

at::Tensor by_note(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
                   std::optional<double> scale, bool grouped) {
  return noting::asked(q, k, v, mask, scale, grouped);
}

PyMethodDef note_methods[] = {
    {"notes", noting::notes, METH_VARARGS, "(table of noted masks, answers for one, (numbers of q times keys that are too few, with gradients))"},
    {nullptr, nullptr, 0, nullptr}};
