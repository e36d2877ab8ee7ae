// The gradients of the scans over vectors of channels, and the table of all of the scans' kernels.
//
// With h the state before a step, h' after it, and g' the gradient of h' as far as later steps use it:
//   h' = e h + x B,   e = exp(dt A),   x = dt u,   y = C . h'
// the step's gradients are, where gy is that of y,
//   of h':  gh = g' + gy C        of C:  gy h'         of B:  sum over channels of gh x
//   of h:   gh e                  of dt A:  gh e h     of u:  dt (gh . B)      of dt:  u (gh . B) + A . (gh e h)
#pragma once

#include <utility>

#include "scan_path.h"

namespace xrk::cpu {
namespace {

constexpr double ln2 = 0.69314718055994530942;

// Lane i of the result: of a where bit S of i is 0, of b where it is 1, the sum of that lane and the one S away.
template <typename T, std::size_t S, std::size_t... lane>
inline Vector<T> fold(Vector<T> a, Vector<T> b, std::index_sequence<lane...>) {
#if defined(__clang__)
  constexpr int size = sizeof...(lane);
  const Vector<T> own = __builtin_shufflevector(a, b, (lane & S ? static_cast<int>(lane) + size : lane)...);
  const Vector<T> other = __builtin_shufflevector(a, b, (lane & S ? static_cast<int>(lane) : lane + size)...);
  return own + __builtin_shufflevector(other, other, (lane ^ S)...);
#else
  using I = typename Lanes<T>::I;
  constexpr std::size_t size = sizeof...(lane);
  const Vector<T> own = __builtin_shuffle(a, b, I{(lane & S ? lane + size : lane)...});
  const Vector<T> other = __builtin_shuffle(a, b, I{(lane & S ? lane : lane + size)...});
  return own + __builtin_shuffle(other, I{(lane ^ S)...});
#endif
}

// Lane i of v[0]: the sum of all lanes of v[i]. v has as many vectors as they have lanes.
template <typename T, std::size_t S = 1>
inline void fold_all(Vector<T>* v) {
  if constexpr (S < lanes<T>) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < lanes<T> / S; i += 2) {
      v[i / 2] = fold<T, S>(v[i], v[i + 1], std::make_index_sequence<lanes<T>>{});
    }
    fold_all<T, 2 * S>(v);
  }
}

// to[i] = the sum of the lanes of vector i.
template <typename T>
void sum_lanes(const T* from, std::int64_t vectors, T* to) {
  constexpr std::int64_t size = lanes<T>;
  Vector<T> v[size];
  for (; vectors >= size; vectors -= size, from += size * size, to += size) {
#pragma GCC unroll 16
    for (std::int64_t j = 0; j < size; ++j) v[j] = load(from + j * size);
    fold_all<T>(v);
    store(to, v[0]);
  }
  if (vectors == 0) return;
  for (std::int64_t j = 0; j < size; ++j) v[j] = j < vectors ? load(from + j * size) : Vector<T>{};
  fold_all<T>(v);
  store_some(to, v[0], vectors);
}

template <typename T, int G>
void scatter(const Walk<T>& w, T* to, bool add, std::int64_t t, std::int64_t count, std::int64_t channel,
             const T* from) {
  const std::int64_t here = w.width - channel;
  for (std::int64_t i = 0; i < count; ++i, from += G * lanes<T>) {
    T* target = to + position(w.steps, t + i) * w.pitch + channel;
    for (int g = 0; g < G; ++g, target += lanes<T>) {
      const std::int64_t left = here - g * lanes<T>;
      const Vector<T> value = load(from + g * lanes<T>);
      store_some(target, add ? load_some(target, left) + value : value, left);
    }
  }
}

// Where a chunk's vectors lie, each step by step: states before every step and after the last one, decays, the shares of
// lanes in the gradient of its row; then what is of the channels: A, the weights of dt, and their gradients.
template <typename T, int G>
struct Chunk {
  static constexpr std::int64_t size = G * lanes<T>;
  T *states, *decays, *rows, *dt, *slope, *u, *y_grad, *to_u, *to_delta, *a2, *dt_weight, *grads;

  Chunk(T* work, std::int64_t n, std::int64_t rank) {
    const auto take = [&](std::int64_t values) { return std::exchange(work, work + values); };
    states = take((back_steps + 1) * n * size);
    decays = take(back_steps * n * size);
    rows = take(back_steps * (rank + 2 * n) * lanes<T>);
    for (T** each : {&dt, &slope, &u, &y_grad, &to_u, &to_delta}) *each = take(back_steps * size);
    a2 = take(n * size);
    dt_weight = take(rank * size);
    grads = take((n + rank + 1) * size);  // of A, of the weights of dt, of the bias
  }
};

// dt of `count` steps from t on and, with SLOPE, its derivative by what stands before the softplus. Returns whether
// dt * A stays within exp2_within's range.
template <typename T, int G, bool SLOPE>
bool take_steps(const Walk<T>& w, const Chunk<T, G>& chunk, std::int64_t t, std::int64_t count, std::int64_t channel,
                const Vector<T>* steepest) {
  using V = Vector<T>;
  V bias[G], most[G] = {}, doubt[G] = {};
  for (int g = 0; g < G; ++g) bias[g] = load(w.bias + channel + g * lanes<T>);
  if (w.delta) gather<T, T, G>(w, w.delta, t, count, channel, chunk.dt);
  for (std::int64_t i = 0; i < count; ++i) {
    T* const dt = chunk.dt + i * G * lanes<T>;
    V z[G];
    for (int g = 0; g < G; ++g) z[g] = w.delta ? bias[g] + load(dt + g * lanes<T>) : bias[g];
    const T* const row = w.rows + position(w.steps, t + i) * w.row_pitch;
    for (std::int64_t r = 0; r < w.rank; ++r) {
      for (int g = 0; g < G; ++g) {
        z[g] = madd(spread<T>(row[r]), load(chunk.dt_weight + (r * G + g) * lanes<T>), z[g]);
      }
    }
    for (int g = 0; g < G; ++g) {
      V slope = spread<T>(1);
      if (w.softplus) {
        const V e = exp_of_minus_size<T>(z[g]);
        slope = (z[g] >= V{} ? slope : e) / (e + static_cast<T>(1));
        z[g] = softplus_from<T>(z[g], e);
      }
      if (SLOPE) store(chunk.slope + (i * G + g) * lanes<T>, slope);
      store(dt + g * lanes<T>, z[g]);
      most[g] = larger(most[g], larger(z[g], V{} - z[g]));
      doubt[g] = doubt[g] + (z[g] - z[g]);
    }
  }
  bool within = true;
  for (int g = 0; g < G; ++g) {
    const V exponent = (most[g] + doubt[g]) * steepest[g];
    for (std::int64_t j = 0; j < lanes<T>; ++j) within = within && exponent[j] < -Lanes<T>::lowest;
  }
  return within;
}

// The states over one chunk. KEEP: of every step, behind each other, and the decays; otherwise states[0] is replaced.
template <typename T, int G, bool LIMITED, bool KEEP>
void replay(const Walk<T>& w, const Chunk<T, G>& chunk, std::int64_t t, std::int64_t count, T* states) {
  using V = Vector<T>;
  const std::int64_t n_states = w.states;
  const T* const a2 = chunk.a2;
  T* decays = chunk.decays;
  for (std::int64_t i = 0; i < count; ++i) {
    const T* const b = w.b + position(w.steps, t + i) * w.row_pitch;
    V dt[G], x[G];
    for (int g = 0; g < G; ++g) {
      const std::int64_t at = (i * G + g) * lanes<T>;
      dt[g] = load(chunk.dt + at);
      x[g] = dt[g] * load(chunk.u + at);
    }
    T* const after = KEEP ? states + n_states * G * lanes<T> : states;
    for (std::int64_t n = 0; n < n_states; ++n) {
      const V bn = spread<T>(b[n]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const std::int64_t at = (n * G + g) * lanes<T>;
        const V exponent = dt[g] * load(a2 + at);
        const V decay = LIMITED ? exp2_of<T>(exponent) : exp2_within<T>(exponent);
        store(after + at, madd(decay, load(states + at), x[g] * bn));
        if (KEEP) store(decays + at, decay);
      }
    }
    states = after;
    if (KEEP) decays += n_states * G * lanes<T>;
  }
}

template <typename T, int G>
void back_through_chunk(const Walk<T>& w, const Chunk<T, G>& chunk, std::int64_t t, std::int64_t count, T* state_grad) {
  using V = Vector<T>;
  constexpr std::int64_t size = G * lanes<T>;
  const std::int64_t n_states = w.states, rank = w.rank;
  T* const a_grad = chunk.grads;
  T* const dt_weight_grad = a_grad + n_states * size;
  T* const bias_grad = dt_weight_grad + rank * size;
  for (std::int64_t i = count - 1; i >= 0; --i) {
    const std::int64_t row = position(w.steps, t + i) * w.row_pitch;
    const T* const b = w.b + row;
    const T* const c = w.c + row;
    const T* const before = chunk.states + i * n_states * size;
    const T* const after = before + n_states * size;
    const T* const decays = chunk.decays + i * n_states * size;
    T* const rows = chunk.rows + i * (rank + 2 * n_states) * lanes<T>;
    V y_grad[G], dt[G], u[G], x[G], by_b[G] = {}, by_a[G] = {};
    for (int g = 0; g < G; ++g) {
      const std::int64_t at = i * size + g * lanes<T>;
      y_grad[g] = load(chunk.y_grad + at);
      dt[g] = load(chunk.dt + at);
      u[g] = load(chunk.u + at);
      x[g] = dt[g] * u[g];
    }
    for (std::int64_t n = 0; n < n_states; ++n) {
      const V bn = spread<T>(b[n]);
      const V cn = spread<T>(c[n]);
      V to_b = {}, to_c = {};
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const std::int64_t at = (n * G + g) * lanes<T>;
        const V grad = madd(y_grad[g], cn, load(state_grad + at));
        to_c = madd(y_grad[g], load(after + at), to_c);
        to_b = madd(grad, x[g], to_b);
        by_b[g] = madd(grad, bn, by_b[g]);
        const V carried = grad * load(decays + at);
        store(state_grad + at, carried);
        const V to_exponent = carried * load(before + at);
        store(a_grad + at, madd(to_exponent, dt[g], load(a_grad + at)));
        by_a[g] = madd(to_exponent, load(chunk.a2 + at), by_a[g]);
      }
      store(rows + (rank + n) * lanes<T>, to_b);
      store(rows + (rank + n_states + n) * lanes<T>, to_c);
    }
    V to_delta[G];
    for (int g = 0; g < G; ++g) {
      const std::int64_t at = i * size + g * lanes<T>;
      const V to_dt = madd(u[g], by_b[g], by_a[g] * static_cast<T>(ln2));
      to_delta[g] = to_dt * load(chunk.slope + at);
      store(chunk.to_u + at, dt[g] * by_b[g]);
      store(chunk.to_delta + at, to_delta[g]);
      store(bias_grad + g * lanes<T>, load(bias_grad + g * lanes<T>) + to_delta[g]);
    }
    for (std::int64_t r = 0; r < rank; ++r) {
      const V low = spread<T>(w.rows[row + r]);
      V to_low = {};
      for (int g = 0; g < G; ++g) {
        const std::int64_t at = (r * G + g) * lanes<T>;
        to_low = madd(to_delta[g], load(chunk.dt_weight + at), to_low);
        store(dt_weight_grad + at, madd(to_delta[g], low, load(dt_weight_grad + at)));
      }
      store(rows + r * lanes<T>, to_low);
    }
  }
}

// One group's rows of A and of the weights of dt, packed, and the steepest A of each channel.
template <typename T, int G>
void pack_weights(const Walk<T>& w, std::int64_t channel, const Chunk<T, G>& chunk, Vector<T>* steepest) {
  using V = Vector<T>;
  for (int g = 0; g < G; ++g) {
    steepest[g] = V{};
    for (std::int64_t n = 0; n < w.states; ++n) {
      const V a = load(w.a2 + n * w.padded + channel + g * lanes<T>);
      store(chunk.a2 + (n * G + g) * lanes<T>, a);
      steepest[g] = larger(steepest[g], larger(a, V{} - a));
    }
    for (std::int64_t r = 0; r < w.rank; ++r) {
      store(chunk.dt_weight + (r * G + g) * lanes<T>, load(w.dt_weight + r * w.padded + channel + g * lanes<T>));
    }
  }
}

template <typename T, int G>
void keep_group_starts(const WalkBack<T>& back, std::int64_t channel) {
  const Walk<T> w = back.walk;
  const Chunk<T, G> chunk(back.work, w.states, w.rank);
  const std::int64_t values = w.states * G * lanes<T>;
  Vector<T> steepest[G];
  pack_weights<T, G>(w, channel, chunk, steepest);
  T* state = back.starts;
  for (std::int64_t t = 0; t + back_steps < w.steps.count; t += back_steps, state += values) {
    const bool within = take_steps<T, G, false>(w, chunk, t, back_steps, channel, steepest);
    gather_u<T, G>(w, t, back_steps, channel, chunk.u);
    T* const next = state + values;
    for (std::int64_t i = 0; i < values; ++i) next[i] = state[i];
    if (within) {
      replay<T, G, false, false>(w, chunk, t, back_steps, next);
    } else {
      replay<T, G, true, false>(w, chunk, t, back_steps, next);
    }
  }
}

template <typename T, int G>
void walk_group_back(const WalkBack<T>& back, std::int64_t channel, std::int64_t from, std::int64_t to) {
  const Walk<T> w = back.walk;
  const Chunk<T, G> chunk(back.work, w.states, w.rank);
  const std::int64_t size = G * lanes<T>, values = w.states * size;
  const std::int64_t row = w.rank + 2 * w.states, grads = (w.states + w.rank + 1) * size;
  Vector<T> steepest[G];
  pack_weights<T, G>(w, channel, chunk, steepest);
  for (std::int64_t end = to; end > from;) {
    const std::int64_t t = (end - 1) / back_steps * back_steps, count = end - t;
    const bool within = take_steps<T, G, true>(w, chunk, t, count, channel, steepest);
    gather_u<T, G>(w, t, count, channel, chunk.u);
    gather<T, T, G>(w, back.y_grad, t, count, channel, chunk.y_grad);
    const T* const start = back.starts + t / back_steps * values;
    for (std::int64_t i = 0; i < values; ++i) chunk.states[i] = start[i];
    for (std::int64_t i = 0; i < grads; ++i) chunk.grads[i] = 0;
    if (within) {
      replay<T, G, false, true>(w, chunk, t, count, chunk.states);
    } else {
      replay<T, G, true, true>(w, chunk, t, count, chunk.states);
    }
    back_through_chunk<T, G>(w, chunk, t, count, back.state_grad);
    // Sums over many steps lose digits; sums over few are added up in double.
    for (std::int64_t i = 0; i < grads; ++i) back.weight_grads[i] += static_cast<double>(chunk.grads[i]);
    sum_lanes<T>(chunk.rows, count * row, back.rows_grad + (t - from) * row);
    scatter<T, G>(w, back.u_grad, true, t, count, channel, chunk.to_u);
    if (back.delta_grad) scatter<T, G>(w, back.delta_grad, false, t, count, channel, chunk.to_delta);
    end = t;
  }
}

template <typename T>
void keep_starts(const WalkBack<T>& back, std::int64_t first, std::int64_t last) {
  if (first + lanes<T> < last) {
    keep_group_starts<T, group_vectors>(back, first);
  } else {
    keep_group_starts<T, 1>(back, first);
  }
}

template <typename T>
void walk_back(const WalkBack<T>& back, std::int64_t first, std::int64_t last, std::int64_t from, std::int64_t to) {
  if (first + lanes<T> < last) {
    walk_group_back<T, group_vectors>(back, first, from, to);
  } else {
    walk_group_back<T, 1>(back, first, from, to);
  }
}

template <typename T>
constexpr ScanKernels<T> make_scan_kernels() {
  return {lanes<T>, group_vectors * lanes<T>, walk_channels<T>, summarise_channels<T>, project<T>,
          keep_starts<T>, walk_back<T>};
}

constexpr ScanPath make_scan_path() { return {make_scan_kernels<float>(), make_scan_kernels<double>()}; }

}  // namespace
}  // namespace xrk::cpu
