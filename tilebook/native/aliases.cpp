// Whose memory may be changed unseen. A tensor's version tells of changes by itself, its views and `detach()`, but not of
// those by its `data`: who asks for that is met here, and what was made of the tensor ahead of its use is made anew.

#include "shared.h"

#include <torch/csrc/autograd/python_variable.h>

namespace aliasing {
namespace {

PyGetSetDef theirs, ours;

void meet(PyObject* self) {
  if (THPVariable_Check(self)) touched(THPVariable_Unpack(self));
}

PyObject* get(PyObject* self, void* closure) {
  meet(self);
  return theirs.get(self, closure);
}

int set(PyObject* self, PyObject* value, void* closure) {
  meet(self);
  return theirs.set(self, value, closure);
}

}  // namespace
}  // namespace aliasing

bool aliases_met() {
  using namespace aliasing;
  static bool met = false;
  if (met) return true;
  PyObject* const found = PyObject_GetAttrString(THPVariableClass, "data");
  if (!found) PyErr_Clear();
  if (found && Py_IS_TYPE(found, &PyGetSetDescr_Type)) {
    auto* const descriptor = reinterpret_cast<PyGetSetDescrObject*>(found);
    ours = theirs = *descriptor->d_getset;
    met = theirs.get && theirs.set;
    if (met) {
      ours.get = get;
      ours.set = set;
      descriptor->d_getset = &ours;
    }
  }
  Py_XDECREF(found);
  return met;
}
