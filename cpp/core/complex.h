// Complex numbers whose parts are V: a number, or a vector with one number per lane.
#pragma once

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

template <class V>
struct Complex {
  V re, im;
  friend Complex operator*(const Complex& u, const Complex& v) {
    return {u.re * v.re - u.im * v.im, u.re * v.im + u.im * v.re};
  }
  friend Complex operator+(const Complex& u, const Complex& v) { return {u.re + v.re, u.im + v.im}; }
  friend Complex operator-(const Complex& u, const Complex& v) { return {u.re - v.re, u.im - v.im}; }
  friend Complex conj(const Complex& u) { return {u.re, -u.im}; }
};

}  // namespace megalodon::cpu::MEGALODON_ISA
