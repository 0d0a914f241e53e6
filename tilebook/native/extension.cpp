// The extension, which is compiled as one: PyTorch's headers take longer than all that stands in its sources.

#include "served.cpp"

#include "plans.cpp"

#include "casts.cpp"

#include "aliases.cpp"

#include "layouts.cpp"

#include "mlp.cpp"

#include "learned.cpp"

#include "forms.cpp"

#include "gates.cpp"

#include "keys.cpp"

#include "notes.cpp"
