// Activations of the feed-forward layer on vectors: their values and slopes.
#pragma once

#include "common/simd.h"
#include "cpu/linear.h"

namespace warploom::cpu::WARPLOOM_LEVEL {

struct NoActivation {
  template <class V>
  WARPLOOM_INLINE V value(V h) const {
    return h;
  }
  template <class V>
  WARPLOOM_INLINE V slope(V) const {
    return V{} + 1;
  }
};

struct Relu {
  template <class V>
  WARPLOOM_INLINE V value(V h) const {
    return max(V{}, h);  // max returns its second operand for NaN, and so keeps it
  }
  // y is positive where h is.
  template <class V>
  WARPLOOM_INLINE V slope(V y) const {
    return y > V{} ? V{} + 1 : V{};
  }
};

// relu(h)^2 (So et al., 2021).
struct Relu2 {
  template <class V>
  WARPLOOM_INLINE V value(V h) const {
    const V positive = max(V{}, h);
    return positive * positive;
  }
  template <class V>
  WARPLOOM_INLINE V slope(V h) const {
    const V positive = max(V{}, h);
    return positive + positive;
  }
};

// h sigmoid(z(h)), the common form of SiLU and of GELU's tanh approximation, since tanh(u) = 2 sigmoid(2 u) - 1.
template <class Argument>
struct SigmoidGated {
  template <class V>
  static WARPLOOM_INLINE V sigmoid(V z) {
    using Scalar = decltype(z[0] + z[0]);
    const V one = V{} + 1;
    return one / (one + exp2(z * static_cast<Scalar>(-1.4426950408889634)));  // of 2^(-z log2 e)
  }
  template <class V>
  WARPLOOM_INLINE V value(V h) const {
    return h * sigmoid(Argument::z(h));
  }
  template <class V>
  WARPLOOM_INLINE V slope(V h) const {
    const V s = sigmoid(Argument::z(h));
    return s + h * s * (V{} + 1 - s) * Argument::slope(h);
  }
};

struct SiluArgument {
  template <class V>
  static WARPLOOM_INLINE V z(V h) {
    return h;
  }
  template <class V>
  static WARPLOOM_INLINE V slope(V) {
    return V{} + 1;
  }
};

// z = 2 sqrt(2 / pi) (h + 0.044715 h^3) (Hendrycks and Gimpel, 2016).
struct GeluArgument {
  template <class V>
  static WARPLOOM_INLINE V z(V h) {
    using Scalar = decltype(h[0] + h[0]);
    return h * (static_cast<Scalar>(kLinear) + h * h * static_cast<Scalar>(kCubic));
  }
  template <class V>
  static WARPLOOM_INLINE V slope(V h) {
    using Scalar = decltype(h[0] + h[0]);
    return static_cast<Scalar>(kLinear) + h * h * static_cast<Scalar>(3 * kCubic);
  }

 private:
  static constexpr double kLinear = 1.5957691216057308, kCubic = kLinear * 0.044715;
};

// h Phi(h), Phi the normal distribution function (Hendrycks and Gimpel, 2016).
struct Gelu {
  template <class V>
  WARPLOOM_INLINE V value(V h) const {
    return h * Tails<V>(h).below;
  }
  template <class V>
  WARPLOOM_INLINE V slope(V h) const {
    using Scalar = decltype(h[0] + h[0]);
    const Tails<V> tails(h);
    return tails.below + h * tails.bell * static_cast<Scalar>(0.3989422804014327);  // 1 / sqrt(2 pi)
  }

 private:
  // Phi(h), and exp(-h^2 / 2).
  template <class V>
  struct Tails {
    V bell, below;
    explicit WARPLOOM_INLINE Tails(V h) {
      using Scalar = decltype(h[0] + h[0]);
      bell = exp2(h * h * static_cast<Scalar>(-0.7213475204444817));  // of -h^2 / 2 log2 e
      const V outer = beyond(h < V{} ? -h : h, bell);
      below = h < V{} ? outer : V{} + 1 - outer;
    }
  };

  // Phi(-x) for x >= 0. Phi(-x) / bell as a polynomial in 1 / (1 + x / 4), fitted for the least relative error up to
  // x = 14: 6e-8.
  static WARPLOOM_INLINE Floats beyond(Floats x, Floats bell) {
    const Floats t = broadcast(1.0f) / fma(broadcast(0.25f), x, broadcast(1.0f));
    Floats p = broadcast(0.025723356753587723f);
    p = fma(p, t, broadcast(-0.15280874073505402f));
    p = fma(p, t, broadcast(0.2961207330226898f));
    p = fma(p, t, broadcast(-0.20578214526176453f));
    p = fma(p, t, broadcast(0.20175769925117493f));
    p = fma(p, t, broadcast(0.03292807191610336f));
    p = fma(p, t, broadcast(0.10374666750431061f));
    p = fma(p, t, broadcast(0.09851684421300888f));
    p = fma(p, t, broadcast(0.09979747980833054f));
    return bell * t * p;
  }
  static WARPLOOM_INLINE Doubles beyond(Doubles x, Doubles) {
    for (int i = 0; i < kLanes<Doubles>; ++i) x[i] = __builtin_erfc(x[i] * 0.7071067811865476) / 2;
    return x;
  }
};

// Calls body with the activation of this kind.
template <class Body>
WARPLOOM_INLINE void with_activation(Activation kind, Body&& body) {
  switch (kind) {
    case Activation::kNone:
      return body(NoActivation{});
    case Activation::kRelu:
      return body(Relu{});
    case Activation::kRelu2:
      return body(Relu2{});
    case Activation::kGelu:
      return body(Gelu{});
    case Activation::kGeluTanh:
      return body(SigmoidGated<GeluArgument>{});
    case Activation::kSilu:
      return body(SigmoidGated<SiluArgument>{});
  }
}

}  // namespace warploom::cpu::WARPLOOM_LEVEL
