// The order of the scans' gradients: blocks of steps from the last to the first, and groups of channels on threads. What
// is summed over channels is summed group by group, so the bytes are the same for every number of threads.
#include <memory>
#include <new>

#include "scan_work.h"

namespace xrk::cpu {
namespace {

// Steps whose shares in the gradients of B and C are held at a time.
constexpr std::int64_t block_steps = 128 * back_steps;

// Whole vectors of it never cross a cache line.
constexpr std::align_val_t alignment{64};

struct Free {
  void operator()(void* p) const { ::operator delete[](p, alignment); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Not filled.
template <typename T>
Buffer<T> buffer(std::int64_t values) {
  return Buffer<T>(new (alignment) T[static_cast<std::size_t>(values)]);
}

}  // namespace

template <typename T>
void selective_scan_backward(const Scan1d<T>& scan, const Scan1dGradients<T>& gradients, std::size_t threads) {
  const ScanKernels<T>& kernel = kernels<T>();
  const std::int64_t channels = scan.channels / scan.groups;  // of one group that shares B and C
  const std::int64_t states = scan.states, length = scan.length, rank = gradients.rank;
  const std::int64_t row = rank + 2 * states;
  std::vector<Prepared<T>> prepared(static_cast<std::size_t>(scan.groups));
  for (std::int64_t g = 0; g < scan.groups; ++g) {
    Prepared<T>& p = prepared[g];
    p.padded = round_up(channels, kernel.lanes);
    prepare_a(scan.a + g * channels * states, false, channels, states, p);
    prepare_vector(scan.bias ? scan.bias + g * channels : nullptr, channels, p.padded, p.bias);
    prepare_dt_weight(gradients.dt_weight, channels, rank, p);
  }
  const std::int64_t padded = prepared[0].padded;
  const std::int64_t blocks = (padded + kernel.group - 1) / kernel.group;
  const std::int64_t tasks = scan.batch * scan.groups * blocks;
  const std::int64_t values = states * kernel.group;  // of a task's state
  const std::int64_t weights = (states + rank + 1) * kernel.group;
  const std::int64_t chunks = (length + back_steps - 1) / back_steps;
  const std::int64_t work_values = back_values(states, rank, kernel.group);
  const Buffer<T> starts = buffer<T>(tasks * chunks * values);
  const Buffer<T> state_grads = buffer<T>(tasks * values);
  const Buffer<T> shares = buffer<T>(tasks * std::min(length, block_steps) * row);
  std::vector<double> weight_grads(static_cast<std::size_t>(tasks * weights));

  // A task is an image's channels [first, last) of one group; their place among all channels is `at`.
  struct Task {
    std::int64_t image, group, first, last, at;
  };
  const auto task_of = [&](std::int64_t task) {
    const std::int64_t first = task % blocks * kernel.group, group = task / blocks % scan.groups;
    return Task{task / blocks / scan.groups, group, first, std::min(first + kernel.group, padded),
                group * channels + first};
  };
  // work(place among all, place among the task's) for each of `count` values of each of a task's channels.
  const auto for_values = [&](const Task& task, std::int64_t count, const auto& work) {
    const std::int64_t size = task.last - task.first, here = std::min(task.last, channels) - task.first;
    for (std::int64_t d = 0; d < here; ++d) {
      for (std::int64_t n = 0; n < count; ++n) work((task.at + d) * count + n, n * size + d);
    }
  };
  const auto back_of = [&](std::int64_t number, const Task& task, T* work) {
    const Prepared<T>& p = prepared[task.group];
    const std::int64_t offset = task.image * length * scan.channels + task.group * channels;
    WalkBack<T> back{};
    Walk<T>& walk = back.walk;
    walk.steps = {scan.order, 0, 1, length};
    if (scan.reversed) walk.steps = {nullptr, length - 1, -1, length};
    if (scan.order && scan.order_per_image) walk.steps.order += task.image * length;
    walk.u = scan.u + offset;
    walk.u_storage = sizeof(T) == 8 ? S_F64 : S_F32;
    walk.pitch = scan.channels;
    walk.width = channels;
    walk.padded = padded;
    walk.bias = p.bias.data();
    walk.softplus = scan.softplus;
    walk.rank = rank;
    walk.dt_weight = p.dt_weight.data();
    if (gradients.rows) {
      walk.rows = gradients.rows + task.image * length * row;
      walk.b = walk.rows + rank;
      walk.c = walk.b + states;
      walk.row_pitch = row;
    } else {
      const std::int64_t at = (task.image * scan.groups + task.group) * length * states;
      walk.rows = walk.b = scan.b + at;
      walk.c = scan.c + at;
      walk.row_pitch = states;
      walk.delta = scan.delta + offset;
      back.delta_grad = gradients.delta_grad + offset;
    }
    walk.states = states;
    walk.a2 = p.a2.data();
    back.y_grad = gradients.y_grad + offset;
    back.u_grad = gradients.u_grad + offset;
    back.starts = starts.get() + number * chunks * values;
    back.state_grad = state_grads.get() + number * values;
    back.weight_grads = weight_grads.data() + number * weights;
    back.work = work;
    return back;
  };

  const std::int64_t image_state = scan.channels * states;
  const std::int64_t cost = scan.batch * scan.channels * (states + 2);  // of a step
  share(tasks, cost * length, threads, [&](std::int64_t from, std::int64_t to) {
    const Buffer<T> work = buffer<T>(work_values);
    for (std::int64_t number = from; number < to; ++number) {
      const Task task = task_of(number);
      const WalkBack<T> back = back_of(number, task, work.get());
      std::fill(back.starts, back.starts + values, T(0));
      std::fill(back.state_grad, back.state_grad + values, T(0));
      for_values(task, states, [&](std::int64_t whole, std::int64_t own) {
        if (scan.start) back.starts[own] = scan.start[task.image * image_state + whole];
        if (gradients.state_grad) back.state_grad[own] = gradients.state_grad[task.image * image_state + whole];
      });
      kernel.keep_starts(back, task.first, task.last);
    }
  });
  for (std::int64_t end = length; end > 0;) {
    const std::int64_t begin = (end - 1) / block_steps * block_steps, count = end - begin;
    const std::int64_t own = count * row;  // a task's shares
    share(tasks, cost * count * 2, threads, [&](std::int64_t from, std::int64_t to) {
      const Buffer<T> work = buffer<T>(work_values);
      for (std::int64_t number = from; number < to; ++number) {
        const Task task = task_of(number);
        WalkBack<T> back = back_of(number, task, work.get());
        back.rows_grad = shares.get() + number * own;
        kernel.walk_back(back, task.first, task.last, begin, end);
      }
    });
    for (std::int64_t group = 0; group < scan.batch * scan.groups; ++group) {
      const std::int64_t* order = scan.order;
      if (order && scan.order_per_image) order += group / scan.groups * length;
      const T* const first_share = shares.get() + group * blocks * own;
      share(count, own * blocks, threads, [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t t = from; t < to; ++t) {
          const std::int64_t step = begin + t;
          const std::int64_t at = group * length + (order ? order[step] : scan.reversed ? length - 1 - step : step);
          const auto sum = [&](std::int64_t first, std::int64_t number, T* sums) {
            const T* own_share = first_share + t * row + first;
            std::copy(own_share, own_share + number, sums);
            for (std::int64_t block = 1; block < blocks; ++block) {
              own_share += own;
              for (std::int64_t n = 0; n < number; ++n) sums[n] += own_share[n];
            }
          };
          if (gradients.rows) {
            sum(0, row, gradients.rows_grad + at * row);
          } else {
            sum(0, states, gradients.b_grad + at * states);
            sum(states, states, gradients.c_grad + at * states);
          }
        }
      });
    }
    end = begin;
  }
  // Of the weights: the sum over images.
  const auto collect = [&](std::int64_t count, std::int64_t offset, T* to) {
    if (!to) return;
    std::vector<double> sums(static_cast<std::size_t>(scan.channels * count));
    for (std::int64_t number = 0; number < tasks; ++number) {
      const Task task = task_of(number);
      const double* const own_grads = weight_grads.data() + number * weights + offset * (task.last - task.first);
      for_values(task, count, [&](std::int64_t whole, std::int64_t own) { sums[whole] += own_grads[own]; });
    }
    for (std::size_t i = 0; i < sums.size(); ++i) to[i] = static_cast<T>(sums[i]);
  };
  collect(states, 0, gradients.a_grad);
  collect(rank, states, gradients.dt_weight_grad);
  collect(1, states + rank, gradients.bias_grad);
  if (!gradients.state_grad) return;
  for (std::int64_t number = 0; number < tasks; ++number) {
    const Task task = task_of(number);
    for_values(task, states, [&](std::int64_t whole, std::int64_t own) {
      gradients.state_grad[task.image * image_state + whole] = state_grads[number * values + own];
    });
  }
}

template void selective_scan_backward<float>(const Scan1d<float>&, const Scan1dGradients<float>&, std::size_t);
template void selective_scan_backward<double>(const Scan1d<double>&, const Scan1dGradients<double>&, std::size_t);

}  // namespace xrk::cpu
