// Ops of PyTorch's, served by recorded launches where a call like this one has them, and by PyTorch's own kernels else.
//
// A kernel stands at the dispatch key BackendSelect, below autograd and autocast and above every backend. So gradients,
// transforms and saved tensors are PyTorch's own affair, and a call that is not served goes on to the kernel that would
// have had it. What is like what is told by all that a launch depends on: sizes, strides, dtypes, alignment, numbers.
// A kind of call that is new is asked about in Python, once or a few times; then it is known here.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "described.h"
#include "plans.h"

namespace served {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::jit::Stack;

constexpr size_t kMostKinds = 10000;

enum class Decision { ask, left, planned };

// What is known of one kind of call. Its token is among `tokens`.
struct Kind {
  Decision decision = Decision::ask;
  Plan plan;
  PyObject* token = nullptr;
  std::atomic<int64_t> calls{0};
};

std::shared_mutex kinds_lock;
std::unordered_map<Key, std::shared_ptr<Kind>, Hash> kinds;
uint64_t generation = 0;  // of what is known: another after `clear`; under the lock
// Objects of Python, each held once, those of plans for ever: launches need the code that they keep loaded. Under the GIL.
std::unordered_set<PyObject*> tokens, planned_tokens;
std::atomic<bool> on{false};
std::atomic<bool> met{false};  // a tensor of the device that is served, which a forked process cannot use
std::atomic<bool> always_ask{false};
std::atomic<int> served_device{static_cast<int>(c10::DeviceType::CUDA)};
PyObject* resolver = nullptr;
std::vector<std::unique_ptr<torch::Library>> installed;

thread_local bool asking = false;
thread_local Key key;

std::shared_ptr<Kind> found() {
  std::shared_lock<std::shared_mutex> guard(kinds_lock);
  const auto it = kinds.find(key);
  return it == kinds.end() ? nullptr : it->second;
}

// ---- Python

PyObject* wrapped(const c10::IValue& value) {
  if (value.isTensor() && value.toTensor().defined()) return THPVariable_Wrap(value.toTensor());
  if (value.isDouble()) return PyFloat_FromDouble(value.toDouble());
  if (value.isInt()) return PyLong_FromLongLong(value.toInt());
  if (value.isBool()) return PyBool_FromLong(value.toBool());
  if (value.isList()) {
    const auto list = value.toListRef();
    PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(list.size()));
    for (size_t i = 0; made && i < list.size(); ++i) PyTuple_SET_ITEM(made, i, wrapped(list[i]));
    return made;
  }
  Py_RETURN_NONE;
}

uint64_t generation_now() {
  std::shared_lock<std::shared_mutex> guard(kinds_lock);
  return generation;
}

// Remembers a kind, unless all has been forgotten since it was asked about.
void keep(std::shared_ptr<Kind> kind, uint64_t since) {
  std::unique_lock<std::shared_mutex> guard(kinds_lock);
  if (since != generation) return;
  if (kinds.size() >= kMostKinds) kinds.clear();
  kinds[key] = std::move(kind);
}

// Lets go of what no plan needs, once no kind is known any more. Under the GIL.
void release_tokens() {
  std::vector<PyObject*> free;
  for (auto it = tokens.begin(); it != tokens.end();) {
    if (planned_tokens.count(*it)) {
      ++it;
    } else {
      free.push_back(*it);
      it = tokens.erase(it);
    }
  }
  // Whose end may run Python, which may come here again.
  staying([&] { std::for_each(free.begin(), free.end(), Py_DecRef); });
}

// Makes room for another kind. Under the GIL.
void make_room() {
  {
    std::unique_lock<std::shared_mutex> guard(kinds_lock);
    if (kinds.size() < kMostKinds) return;
    kinds.clear();
  }
  release_tokens();
}

// While Python is asked, calls of this thread are PyTorch's; what it does may come here again and use `key`.
struct Asking {
  const Key mine = key;
  Asking() { asking = true; }
  ~Asking() {
    asking = false;
    key = mine;
  }
};

// Asks Python about a kind of call. True where it has computed this one, whose outputs then replace the arguments.
//
// The answer is (outputs or None, decision, token): None to ask again, False for PyTorch's kernel, or a plan.
bool asked(const c10::FunctionSchema& schema, Stack* stack, size_t count, bool kept) {
  const std::string& name = schema.name();
  const size_t first = stack->size() - count;
  const Gil gil;
  if (!resolver) return false;
  const uint64_t since = generation_now();
  const Object args(PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i) PyTuple_SET_ITEM(args.held, i, wrapped((*stack)[first + i]));
  const auto call = [&] {
    const Asking now;
    return staying([&] {
      return PyObject_CallFunction(resolver, "s#O", name.data(), static_cast<Py_ssize_t>(name.size()), args.held);
    });
  };
  const Object answer(call());
  if (!answer && !PyErr_ExceptionMatches(PyExc_Exception)) {  // Ctrl-C, or the end of the program
    python_error raised;
    raised.persist();
    throw raised;
  }
  PyObject *outputs, *decision, *token;
  if (!answer || !PyArg_ParseTuple(answer, "OOO", &outputs, &decision, &token)) {
    PyErr_WriteUnraisable(resolver);
    return false;
  }
  if (kept && decision != Py_None) {
    auto kind = std::make_shared<Kind>();
    kind->decision = decision == Py_False ? Decision::left : Decision::planned;
    if (decision != Py_False && !parsed(decision, schema, kind->plan)) {
      PyErr_WriteUnraisable(resolver);
      kind->decision = Decision::left;
    }
    make_room();
    if (tokens.insert(token).second) Py_INCREF(token);
    if (kind->decision == Decision::planned) planned_tokens.insert(token);
    kind->token = token;
    keep(std::move(kind), since);
  }
  if (outputs == Py_None) return false;
  std::vector<c10::IValue> values;
  const Object items(PySequence_Fast(outputs, "expected outputs"));
  for (Py_ssize_t i = 0; items && i < PySequence_Fast_GET_SIZE(items.held); ++i) {
    PyObject* each = PySequence_Fast_GET_ITEM(items.held, i);
    if (PyLong_Check(each)) {
      values.emplace_back(static_cast<int64_t>(PyLong_AsLongLong(each)));
    } else {
      values.emplace_back(THPVariable_Check(each) ? THPVariable_Unpack(each) : at::Tensor());
    }
  }
  if (!items) {
    PyErr_WriteUnraisable(resolver);
    return false;
  }
  torch::jit::drop(*stack, count);
  for (auto& each : values) stack->emplace_back(std::move(each));
  return true;
}

DispatchKeySet below() {
  static const DispatchKeySet keys(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
  return keys;
}

// Has a call that `key` describes been computed? By what is known of its kind, or by Python where nothing is; its outputs
// then replace the arguments on the stack.
bool answered(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack, const std::shared_ptr<Kind>& kind, bool all) {
  const size_t count = op.schema().arguments().size();
  if (!kind) return asked(op.schema(), stack, count, !all);
  kind->calls.fetch_add(1, std::memory_order_relaxed);
  if (kind->decision != Decision::planned) return false;
  const auto outcome = repeated(op, ks & below(), kind->plan, stack, count);
  if (outcome == Outcome::never) {
    auto broken = std::make_shared<Kind>();
    broken->decision = Decision::left;
    keep(std::move(broken), generation_now());
  }
  return outcome == Outcome::done;
}

// Attention of one row each is decoding, whose keys are one more at every call: none is like another.
bool has_one_row(const at::Tensor& tensor) {
  return tensor.defined() && tensor.dim() == 4 && ordinary(tensor, served_kind()) && tensor.size(2) == 1;
}

// An op whose types nobody here knows.
void serve(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  if (on.load(std::memory_order_relaxed) && !asking) {
    const auto args = torch::jit::last(*stack, op.schema().arguments().size());
    Description call(key, &op.schema());
    const bool whole = std::all_of(args.begin(), args.end(), [&](const c10::IValue& each) { return call.add(each); });
    if (whole && call.any()) {
      met.store(true, std::memory_order_relaxed);
      const bool all = always_ask.load(std::memory_order_relaxed);
      if (answered(op, ks, stack, all ? nullptr : found(), all)) return;
    }
  }
  op.redispatchBoxed(ks & below(), stack);
}

}  // namespace
}  // namespace served

#include "typed.h"

namespace served {
namespace {

PyObject* install(PyObject*, PyObject* given) {
  const char* name;
  int of_rows = 0;
  if (!PyArg_ParseTuple(given, "s|p", &name, &of_rows)) return nullptr;
  try {
    const std::string space(name, std::string(name).find("::"));
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, space, DispatchKey::BackendSelect,
                                                    "tilebook/native", __LINE__);
    const Maker kernel = typed(name, of_rows);
    library->impl(name, kernel ? kernel() : torch::CppFunction::makeFromBoxedFunction<&serve>());
    installed.push_back(std::move(library));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* stop(PyObject*, PyObject*) {
  on = false;
  notes_on(false);
  casts_on(false, false);
  layouts_on(false, served_device == static_cast<int>(c10::DeviceType::CPU));
  Py_RETURN_NONE;
}

PyObject* able(PyObject*, PyObject*) { return PyBool_FromLong(driver_found()); }

PyObject* start(PyObject*, PyObject* given) {
  PyObject* function;
  if (!PyArg_ParseTuple(given, "O", &function)) return nullptr;
  Py_INCREF(function);
  Py_XSETREF(resolver, function);
  on = true;
  notes_on(true);
  const bool cpu = served_device == static_cast<int>(c10::DeviceType::CPU);
  casts_on(true, cpu);
  layouts_on(true, cpu);
  Py_RETURN_NONE;
}

PyObject* ask(PyObject*, PyObject* given) {
  int all;
  if (!PyArg_ParseTuple(given, "p", &all)) return nullptr;
  always_ask = all;
  Py_RETURN_NONE;
}

PyObject* clear(PyObject*, PyObject*) {
  {
    std::unique_lock<std::shared_mutex> guard(kinds_lock);
    kinds.clear();
    ++generation;
  }
  release_tokens();
  Py_RETURN_NONE;
}

// [(token, calls since last asked)]
PyObject* counted(PyObject*, PyObject*) {
  std::vector<std::shared_ptr<Kind>> all;
  {
    std::shared_lock<std::shared_mutex> guard(kinds_lock);
    for (const auto& each : kinds) all.push_back(each.second);
  }
  for (const auto& each : all) Py_XINCREF(each->token);  // a collection of garbage may have them released meanwhile
  PyObject* list = PyList_New(0);
  for (const auto& each : all) {
    if (!list || !each->token) continue;
    const Object pair(Py_BuildValue("(OL)", each->token, static_cast<long long>(each->calls.exchange(0))));
    if (!pair || PyList_Append(list, pair) != 0) Py_CLEAR(list);
  }
  for (const auto& each : all) Py_XDECREF(each->token);
  return list;
}

// For tests: calls of CPU tensors are served, and these addresses launch and change maps.
PyObject* pretend(PyObject*, PyObject* given) {
  unsigned long long address, maps = 0;
  if (!PyArg_ParseTuple(given, "K|K", &address, &maps)) return nullptr;
  pretend_driver(address, maps);
  served_device = static_cast<int>(address ? c10::DeviceType::CPU : c10::DeviceType::CUDA);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"install", install, METH_VARARGS, "Serves this op, named with its namespace; if true, not where its first tensor has one row."},
    {"able", able, METH_NOARGS, "Can launches be started here?"},
    {"start", start, METH_VARARGS, "Serves; answers are this function's."},
    {"stop", stop, METH_NOARGS, "Serves none any more."},
    {"ask", ask, METH_VARARGS, "Asks about every call, if true."},
    {"clear", clear, METH_NOARGS, "Forgets all answers."},
    {"counted", counted, METH_NOARGS, "[(token, calls since last asked)]"},
    {"pretend", pretend, METH_VARARGS, "Serves calls on the CPU, launched (and mapped) at addresses; 0 for none."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "tilebook_served", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace served

using namespace served;

bool ordinary(const at::Tensor& tensor, c10::DeviceType kind) {
  static const DispatchKeySet gpu({DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA,
                                   DispatchKey::ADInplaceOrView});
  static const DispatchKeySet cpu({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                                   DispatchKey::ADInplaceOrView});
  const auto& allowed = kind == c10::DeviceType::CPU ? cpu : gpu;
  return tensor.layout() == at::kStrided && !(tensor.key_set().raw_repr() & ~allowed.raw_repr()) && tensor.has_storage();
}

c10::DeviceType served_kind() { return static_cast<c10::DeviceType>(served_device.load(std::memory_order_relaxed)); }

// Throws where another copy is in the process. Not at static initialization, where that would end it.
void define_ours() {
  static torch::Library library(torch::Library::DEF, "tilebook_native", std::nullopt, "tilebook/native", __LINE__);
  static const bool defined = (define_sums(library), define_additions(library), true);
  (void)defined;
}

extern "C" PyMODINIT_FUNC PyInit_tilebook_served() {
  try {
    define_ours();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  // In a forked process nobody is there to give the lock back, and no GPU that was in use before.
  pthread_atfork(nullptr, nullptr, [] {
    new (&kinds_lock) std::shared_mutex;
    if (met) on = false;
  });
  PyObject* made = PyModule_Create(&module);
  for (PyMethodDef* more : {gate_methods, key_methods, note_methods}) {
    if (made && PyModule_AddFunctions(made, more) != 0) Py_CLEAR(made);
  }
  return made;
}
