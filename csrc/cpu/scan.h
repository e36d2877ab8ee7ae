// Selective scans on the CPU. A walk follows positions one after the other and carries N states for each channel;
// vectors lie over channels. Everything here is computed in float or in double; maps may be stored as half or bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "storage.h"

namespace xrk::cpu {

// Positions visited one after the other: order[t], or first + t * stride where there is no order.
struct Steps {
  const std::int64_t* order;
  std::int64_t first;
  std::int64_t stride;
  std::int64_t count;
};

// What a walk does with its values. Where out is stored in 16 bits, all puts but the last keep whole floats: their upper
// halves in out, their lower halves in `rest`; so a sum is rounded once.
enum class Put { set, add, last };

// h = exp2(dt * A2) h + dt * B * u;  y = C . h + skip * u, over `steps`, for channels [0, width).
//
// Arrays of parameters and of state are padded to `padded` channels, a multiple of a path's lanes.
template <typename T>
struct Walk {
  Steps steps;
  Steps next;  // where the scan goes on afterwards (count 0: nowhere), to fetch its first pixels ahead
  const void* u;  // [position, pitch]
  Storage u_storage;
  void* y;  // [position, pitch]
  std::uint16_t* rest;
  Storage y_storage;
  Put put;
  std::int64_t pitch;
  std::int64_t width;
  std::int64_t padded;
  // dt = delta[position, pitch] where delta is given, else the sum over r of rows[t][r] * dt_weight[r]; then + bias,
  // then softplus where asked for.
  const T* delta;
  const T* dt_weight;  // [rank, padded]
  std::int64_t rank;
  const T* bias;       // [padded]
  bool softplus;
  const T* rows;       // the low-rank dt, by step
  const T* b;          // N values by row
  const T* c;          // N values by row
  std::int64_t row_pitch;
  bool rows_by_step;   // row t belongs to step t; otherwise row p to position p
  std::int64_t states;
  const T* a2;         // [N, padded], A / ln 2
  const T* skip;       // [padded]
  T* state;            // [N, padded]
  T* delta_sum;        // [padded], written by a summary only
};

constexpr std::int64_t most_states = 64;

// The gradients of a walk over at most `group` channels, from the last step to the first. The states are not kept: each
// chunk of `back_steps` steps makes its own again, from the state that its first step starts from.
//
// Of the walk, u is stored as T, rows lie by position, dt is made of delta or of rows, never of both (rank 0, or delta
// null); skip, y and state are not used. Arrays by channel are packed: their channels are those of one call, rounded up
// to whole vectors.
template <typename T>
struct WalkBack {
  Walk<T> walk;
  const T* y_grad;       // [position, pitch]
  T* u_grad;             // [position, pitch], added to
  T* delta_grad;         // [position, pitch], or null
  T* starts;             // [chunk, N, channels], the first one given
  T* state_grad;         // [N, channels], of the state after the steps that becomes that of the state before them
  double* weight_grads;  // [N + rank + 1, channels], added to: of A, of dt_weight and of the bias
  T* rows_grad;          // [step, rank + 2N], of the low-rank dt, B and C, these channels' share
  T* work;               // of back_values values
};

constexpr std::int64_t back_steps = 32;

// What one call of walk_back works with.
constexpr std::int64_t back_values(std::int64_t states, std::int64_t rank, std::int64_t group) {
  return (2 * back_steps + 1) * states * group + back_steps * (rank + 2 * states + 6) * group +
         (2 * states + 2 * rank + 1) * group;
}

// The kernels of one instruction set for one type.
template <typename T>
struct ScanKernels {
  std::int64_t lanes;
  std::int64_t group;  // channels that one call of walk does best
  // Channels [first, last), first a multiple of lanes.
  void (*walk)(const Walk<T>& walk, std::int64_t first, std::int64_t last);
  // The stretch's sum of dt and the state at its end when it starts from zero. Walks backwards and leaves out what has
  // decayed below the type's rounding.
  void (*summarise)(const Walk<T>& walk, std::int64_t first, std::int64_t last);
  // rows[t] = x[position] . weight, with weight [channels, outputs], outputs a multiple of lanes.
  void (*project)(const void* x, Storage storage, std::int64_t channels, const Steps& steps, const T* weight,
                  std::int64_t outputs, T* rows);
  // Of channels [first, last), at most `group`, first a multiple of lanes: the starts of all chunks but the first.
  void (*keep_starts)(const WalkBack<T>& back, std::int64_t first, std::int64_t last);
  // Their gradients over steps [from, to), from a multiple of back_steps, `to` one or the last step.
  void (*walk_back)(const WalkBack<T>& back, std::int64_t first, std::int64_t last, std::int64_t from, std::int64_t to);
};

struct ScanPath {
  ScanKernels<float> single;
  ScanKernels<double> twice;
};

const ScanPath& baseline_scan_path();
#ifdef XRK_X86
const ScanPath& avx2_scan_path();
const ScanPath& avx512_scan_path();
#endif

// A map (B, H, W, D); T is float for the 16-bit storages.
struct Map {
  const void* values;
  Storage storage;
  std::int64_t batch, height, width;
};

// The weights of SS2D, C-contiguous: projection (4, R+2N, D), dt_weight (4, D, R), dt_bias (4, D), a_logs (4D, N),
// skip (4D).
template <typename T>
struct Ss2dWeights {
  const T* projection;
  const T* dt_weight;
  const T* dt_bias;
  const T* a_logs;
  const T* skip;
  std::int64_t channels;
  std::int64_t rank;
  std::int64_t states;
};

// y (B, H, W, D), stored as x, = the sum of the four directions of x. The same bytes for every number of threads.
template <typename T>
void selective_scan_2d(const Map& x, const Ss2dWeights<T>& weights, void* y, std::size_t threads);

// The lines of one direction k, of one band (B, H, W, D): rows for k = 0 and 2, columns for 1 and 3.
// sums (B, lines, D) and ends (B, lines, D, N): each line's sum of dt, and its end state from a start of zero.
template <typename T>
void summarise_lines(const Map& x, const Ss2dWeights<T>& weights, int direction, T* sums, T* ends,
                     std::size_t threads);

// y += every line of direction k from its own start state; states (B, lines, D, N) holds the starts and then the ends.
template <typename T>
void scan_lines(const Map& x, const Ss2dWeights<T>& weights, int direction, T* states, T* y, std::size_t threads);

// The 1-D scan, channels last: u, delta, y (B, L, D); b, c (B, groups, L, N); a (D, N); skip, bias (D) or null;
// order (L), or (B, L) with order_per_image, or null; state (B, D, N) holds the start and then the end.
template <typename T>
struct Scan1d {
  const T* u;
  const T* delta;
  const T* a;
  const T* b;
  const T* c;
  const T* skip;
  const T* bias;
  const std::int64_t* order;
  bool order_per_image;
  bool reversed;  // from the last position to the first, without an order; by the gradients only
  bool softplus;
  const T* start;  // read by the gradients, instead of state; null: zero
  T* state;
  T* y;
  std::int64_t batch, length, channels, groups, states;
};

template <typename T>
void selective_scan(const Scan1d<T>& scan, std::size_t threads);

// Gradients of a 1-D scan whose dt is softplus(bias + dt_weight low): low, B and C are the rows (B, L, rank + 2N), of
// one group. With `delta` they are those of `selective_scan`: rank is 0 and b, c stand for rows. The scan's skip, state
// and y are not used. The same bytes for every number of threads.
template <typename T>
struct Scan1dGradients {
  const T* rows;        // null with delta
  const T* dt_weight;   // (D, rank)
  std::int64_t rank;
  const T* y_grad;      // (B, L, D)
  T* state_grad;        // (B, D, N), of the last state; becomes that of the first
  T* u_grad;            // (B, L, D), added to: what came by way of the skip is already there
  T* delta_grad;        // (B, L, D), with delta
  T* a_grad;            // (D, N)
  T* b_grad;            // (B, groups, L, N), with delta
  T* c_grad;            // the same
  T* rows_grad;         // (B, L, rank + 2N), without delta
  T* dt_weight_grad;    // (D, rank), without delta
  T* bias_grad;         // (D), without delta
};

template <typename T>
void selective_scan_backward(const Scan1d<T>& scan, const Scan1dGradients<T>& gradients, std::size_t threads);

}  // namespace xrk::cpu
