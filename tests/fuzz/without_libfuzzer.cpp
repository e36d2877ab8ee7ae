// Stands in for libFuzzer where the compiler comes without it (GCC): PROGRAM SECONDS CORPUS mutates the corpus' files, and
// keeps what reaches new code, which -fsanitize-coverage=trace-pc tells. An input that fails or takes more than 5 s is
// written beside the corpus' files as crash-*. Compiled itself without that option.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr std::size_t largest = 8192;

unsigned char reached[1 << 16];  // of this input, by a hash of the place in the code
bool known[1 << 16];
Bytes current;
std::string folder;

void keep_current() {
  const std::string name = folder + "/crash-" + std::to_string(getpid());
  if (std::FILE* file = std::fopen(name.c_str(), "wb")) {
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
  }
}

void on_signal(int number) {
  keep_current();
  std::fprintf(stderr, number == SIGALRM ? "an input takes more than 5 s\n" : "an input ends in a signal\n");
  _exit(1);
}

// Whether the input reaches code that none before it did.
bool run(const Bytes& input) {
  current = input;
  std::fill(std::begin(reached), std::end(reached), 0);
  alarm(5);
  LLVMFuzzerTestOneInput(current.data(), current.size());
  alarm(0);
  bool fresh = false;
  for (std::size_t i = 0; i < std::size(reached); ++i) {
    if (reached[i] && !known[i]) known[i] = fresh = true;
  }
  return fresh;
}

void mutate(Bytes& input, const std::vector<Bytes>& corpus, std::mt19937& chance) {
  const auto below = [&](std::size_t n) { return n == 0 ? 0 : chance() % n; };
  constexpr std::uint32_t odd[] = {0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 257, 32767, 65535, 65536, 0x7fffffff, ~0u};
  for (std::size_t times = 1 + below(4); times > 0; --times) {
    if (input.empty()) input.push_back(0);
    const std::size_t at = below(input.size());
    switch (below(6)) {
      case 0:
        input[at] ^= static_cast<std::uint8_t>(1u << below(8));
        break;
      case 1:
        input[at] = static_cast<std::uint8_t>(chance());
        break;
      case 2: {  // an integer that is an edge somewhere, in either byte order
        const std::uint32_t value = odd[below(std::size(odd))];
        const std::size_t bytes = std::min<std::size_t>(std::size_t{1} << below(3), input.size() - at);
        const bool big = below(2) == 1;
        for (std::size_t i = 0; i < bytes; ++i) {
          input[at + i] = static_cast<std::uint8_t>(value >> 8 * (big ? bytes - 1 - i : i));
        }
        break;
      }
      case 3:
        input.erase(input.begin() + static_cast<std::ptrdiff_t>(at),
                    input.begin() + static_cast<std::ptrdiff_t>(std::min(input.size(), at + 1 + below(16))));
        break;
      case 4: {  // bytes of its own, again
        const std::size_t from = below(input.size());
        const Bytes part(input.begin() + static_cast<std::ptrdiff_t>(from),
                         input.begin() + static_cast<std::ptrdiff_t>(std::min(input.size(), from + 1 + below(32))));
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), part.begin(), part.end());
        break;
      }
      default: {  // another's bytes in their own place
        const Bytes& other = corpus[below(corpus.size())];
        for (std::size_t i = at; i < std::min({input.size(), other.size(), at + 1 + below(64)}); ++i) input[i] = other[i];
      }
    }
  }
  if (input.size() > largest) input.resize(largest);
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  reached[(place * 0x9e3779b97f4a7c15u) >> 48] = 1;
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  folder = arguments[2];
  for (const int number : {SIGALRM, SIGABRT, SIGILL, SIGFPE}) signal(number, on_signal);
  __sanitizer_set_death_callback(keep_current);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
  const auto time_left = [&] { return std::chrono::steady_clock::now() < end; };
  std::vector<Bytes> corpus{{0}};
  std::uint64_t inputs = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    Bytes input{std::istreambuf_iterator<char>(file), {}};
    ++inputs;
    if (run(input)) corpus.push_back(std::move(input));
    if (!time_left()) break;
  }
  std::mt19937 chance(14);
  for (; time_left(); ++inputs) {
    Bytes input = corpus[chance() % corpus.size()];
    mutate(input, corpus, chance);
    if (run(input)) corpus.push_back(std::move(input));
  }
  const auto edges = std::count(std::begin(known), std::end(known), true);
  std::fprintf(stderr, "cov: %ld\nstat::number_of_executed_units: %llu\n", static_cast<long>(edges),
               static_cast<unsigned long long>(inputs));
}
