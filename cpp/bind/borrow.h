// Borrowing arrays from Python: a Python object becomes a DLTensor that is valid while the Borrowed lives.
//
// A torch tensor is read through its DLPack exchange table (no Python call), a NumPy array through its own interface,
// anything else through __dlpack__. An input that is not contiguous, or not aligned to its elements, is copied; an
// array that is written to is not.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "megalodon.h"

namespace megalodon::bind {

namespace py = pybind11;

enum class Family { kTorch, kNumpy, kOther };

class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed();

  // None becomes an absent tensor. Throws TypeError if `object` is no array.
  void borrow(py::handle object, bool written);

  DLTensor* tensor() { return object_ ? &tensor_ : nullptr; }
  Family family() const { return family_; }
  py::handle object() const { return object_; }
  // The stream the array's owner works on at present (nullptr for CPU arrays).
  void* stream() const;

 private:
  void from_torch(py::handle object);
  void from_numpy(py::handle object, bool written);
  void from_dlpack(py::handle object, bool written);
  bool is_contiguous() const;
  bool is_empty() const;

  py::object object_;
  py::object capsule_;
  DLTensor tensor_{};
  Family family_ = Family::kOther;
  int64_t shape_[MEGALODON_MAX_NDIM];
  int64_t strides_[MEGALODON_MAX_NDIM];
};

// A new, uninitialised array of the kind of `like`, described by `spec`.
py::object allocate(const Borrowed& like, const megalodon_spec& spec);

}  // namespace megalodon::bind
