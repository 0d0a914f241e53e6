// Ops of PyTorch's, served by recorded launches where a call like this one has them, and by PyTorch's own kernels else.
//
// A kernel stands at the dispatch key BackendSelect, below autograd and autocast and above every backend. So gradients,
// transforms and saved tensors are PyTorch's own affair, and a call that is not served goes on to the kernel that would
// have had it. What is like what is told by all that a launch depends on: sizes, strides, dtypes, alignment, numbers.
// A kind of call that is new is asked about in Python, once or a few times; then it is known here.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

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

using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 1469598103934665603ull;
    for (int64_t part : key) {
      hash = (hash ^ static_cast<uint64_t>(part)) * 1099511628211ull;
      hash ^= hash >> 29;
    }
    return hash;
  }
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

// Writes all that a launch depends on into `key`. False for a call that is not to be served.
bool described(const void* op, const c10::IValue* args, size_t count) {
  const auto kind = served_kind();
  key.clear();
  key.push_back(reinterpret_cast<int64_t>(op));
  const auto& context = at::globalContext();
  key.push_back(2 * context.deterministicAlgorithmsWarnOnly() + context.deterministicAlgorithms());
  bool any = false;
  int device = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto& arg = args[i];
    if (arg.isTensor()) {
      const at::Tensor& tensor = arg.toTensor();
      if (!tensor.defined()) {
        key.push_back(-1);
        continue;
      }
      if (tensor.device().type() != kind || !ordinary(tensor, kind)) return false;
      if (!any) {
        any = true;
        device = tensor.device().index();
        key.push_back(device);
      } else if (device != tensor.device().index()) {
        return false;
      }
      key.push_back(static_cast<int64_t>(tensor.scalar_type()) << 8 | tensor.dim());
      key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
      key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
      key.push_back(reinterpret_cast<int64_t>(tensor.const_data_ptr()) & 15);
    } else if (arg.isNone()) {
      key.push_back(-2);
    } else if (arg.isDouble()) {
      const double number = arg.toDouble();
      int64_t bits;
      memcpy(&bits, &number, sizeof(bits));
      key.push_back(bits);
    } else if (arg.isInt()) {
      key.push_back(arg.toInt());
    } else if (arg.isBool()) {
      key.push_back(arg.toBool());
    } else if (arg.isList()) {
      const auto list = arg.toListRef();
      key.push_back(static_cast<int64_t>(list.size()));
      for (const auto& each : list) {
        if (!each.isInt() && !each.isBool()) return false;
        key.push_back(each.isInt() ? each.toInt() : each.toBool());
      }
    } else {
      return false;
    }
  }
  if (any) met.store(true, std::memory_order_relaxed);
  return any;
}

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

void serve(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  static const DispatchKeySet below(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
  if (on.load(std::memory_order_relaxed) && !asking) {
    const size_t count = op.schema().arguments().size();
    if (described(&op.schema(), stack->data() + stack->size() - count, count)) {
      const bool all = always_ask.load(std::memory_order_relaxed);
      const auto kind = all ? nullptr : found();
      if (!kind) {
        if (asked(op.schema(), stack, count, !all)) return;
      } else {
        kind->calls.fetch_add(1, std::memory_order_relaxed);
        if (kind->decision == Decision::planned) {
          const auto outcome = repeated(op, ks & below, kind->plan, stack, count);
          if (outcome == Outcome::done) return;
          if (outcome == Outcome::never) {
            auto broken = std::make_shared<Kind>();
            broken->decision = Decision::left;
            keep(std::move(broken), generation_now());
          }
        }
      }
    }
  }
  op.redispatchBoxed(ks & below, stack);
}

// Attention of one row each is decoding, whose keys are one more at every call: none is like another.
void serve_of_rows(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  static const DispatchKeySet below(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
  const auto& first = (*stack)[stack->size() - op.schema().arguments().size()];
  const bool asked_of_all = always_ask.load(std::memory_order_relaxed);
  if (!asked_of_all && first.isTensor() && first.toTensor().defined()) {
    const at::Tensor& tensor = first.toTensor();
    if (tensor.dim() == 4 && ordinary(tensor, served_kind()) && tensor.size(2) == 1) {
      op.redispatchBoxed(ks & below, stack);
      return;
    }
  }
  serve(op, ks, stack);
}

PyObject* install(PyObject*, PyObject* given) {
  const char* name;
  int of_rows = 0;
  if (!PyArg_ParseTuple(given, "s|p", &name, &of_rows)) return nullptr;
  try {
    const std::string space(name, std::string(name).find("::"));
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, space, DispatchKey::BackendSelect,
                                                    "tilebook/native", __LINE__);
    library->impl(name, of_rows ? torch::CppFunction::makeFromBoxedFunction<&serve_of_rows>()
                                : torch::CppFunction::makeFromBoxedFunction<&serve>());
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
