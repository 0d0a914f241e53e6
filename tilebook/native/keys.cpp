// What a call is known by (`tilebook.dispatch.memo`), in one piece: of all its tensors a row of numbers, and what is no
// tensor as it is. Where one is of another class than PyTorch's own two, Python makes the key.

#include "shared.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <c10/util/SmallVector.h>

namespace calling {
namespace {

PyTypeObject* parameter_type = nullptr;
PyObject* by_python = nullptr;

constexpr int64_t kOther = -1;    // begins no tensor: those begin with how many axes they have
constexpr uintptr_t kVector = 15;  // bytes that an address has beyond a whole vector

PyObject* keys(PyObject*, PyObject* args) {
  PyObject *type, *function;
  if (!PyArg_ParseTuple(args, "OO", &type, &function)) return nullptr;
  Py_INCREF(type);
  Py_INCREF(function);
  Py_XDECREF(reinterpret_cast<PyObject*>(parameter_type));
  Py_XDECREF(by_python);
  parameter_type = reinterpret_cast<PyTypeObject*>(type);
  by_python = function;
  Py_RETURN_NONE;
}

// (op, numbers of tensors, what is none of them …)
PyObject* key(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !(PyTuple_Check(given[1]) || PyList_Check(given[1]))) {
    PyErr_SetString(PyExc_TypeError, "key takes an op and its arguments");
    return nullptr;
  }
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(given[1]);
  PyObject** items = PySequence_Fast_ITEMS(given[1]);
  c10::SmallVector<int64_t, 96> numbers;
  c10::SmallVector<PyObject*, 16> others;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* each = items[i];
    const bool plain =
        reinterpret_cast<PyObject*>(Py_TYPE(each)) == THPVariableClass || Py_TYPE(each) == parameter_type;
    if (!plain) {
      if (THPVariable_Check(each)) {
        return staying([&] { return PyObject_CallFunctionObjArgs(by_python, given[0], given[1], nullptr); });
      }
      numbers.push_back(kOther);
      others.push_back(each);
      continue;
    }
    const at::Tensor& tensor = THPVariable_Unpack(each);
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    numbers.push_back(static_cast<int64_t>(sizes.size()));
    numbers.append(sizes.begin(), sizes.end());
    numbers.append(strides.begin(), strides.end());
    const auto device = tensor.is_cpu() ? -1 : static_cast<int64_t>(tensor.get_device());
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) & kVector;
    numbers.push_back(static_cast<int64_t>(tensor.scalar_type()) | static_cast<int64_t>(address) << 8);
    numbers.push_back(device);
  }
  PyObject* made = PyTuple_New(2 + static_cast<Py_ssize_t>(others.size()));
  if (!made) return nullptr;
  PyObject* row = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()),
                                            static_cast<Py_ssize_t>(numbers.size() * sizeof(int64_t)));
  if (!row) {
    Py_DECREF(made);
    return nullptr;
  }
  Py_INCREF(given[0]);
  PyTuple_SET_ITEM(made, 0, given[0]);
  PyTuple_SET_ITEM(made, 1, row);
  for (size_t i = 0; i < others.size(); ++i) {
    Py_INCREF(others[i]);
    PyTuple_SET_ITEM(made, 2 + static_cast<Py_ssize_t>(i), others[i]);
  }
  return made;
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace calling

PyMethodDef key_methods[] = {
    {"keys", calling::keys, METH_VARARGS, "Makes keys of calls: with the class of parameters, and Python's way."},
    {"key", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(calling::key)), METH_FASTCALL,
     "What a call is known by."},
    {nullptr, nullptr, 0, nullptr}};
