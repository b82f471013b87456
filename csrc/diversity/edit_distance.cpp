// The CPU walk of edit_distance.h: Myers' bit-parallel algorithm. Of the table of distances between the prefixes of two
// responses, only the differences between neighbours are kept, which are -1, 0 or 1: a word holds those of 64 rows of a column.
// Bands of 64 rows are walked one after the other, each from left to right; what a band hands to the next one is the
// differences along its last row. So the words of a band fit in registers, and a table of tokens is as long as there are tokens.
#include "diversity/edit_distance.h"

#include <limits>

#include "diversity/prompt_tokens.h"

namespace prefkern {
namespace {

constexpr int64_t kTokensPerTask = 1 << 11, kBand = 64;

struct Span {
  const uint32_t* tokens;
  int64_t size;
};

int64_t words(int64_t n) { return ceil_div(n, kBand); }

class Distance {
 public:
  void set_vocabulary(int64_t tokens) { rows_of_.assign(tokens, 0); }

  int64_t operator()(Span a, Span b) {
    while (a.size && b.size && a.tokens[0] == b.tokens[0]) a = {a.tokens + 1, a.size - 1}, b = {b.tokens + 1, b.size - 1};
    while (a.size && b.size && a.tokens[a.size - 1] == b.tokens[b.size - 1]) a.size--, b.size--;
    if (words(a.size) * b.size > words(b.size) * a.size) std::swap(a, b);  // the fewest steps
    if (a.size == 0) return b.size;
    steps_.assign(b.size, kUp);  // above the first row the distance grows by one with every column
    for (int64_t first = 0; first < a.size; first += kBand) band({a.tokens + first, std::min(kBand, a.size - first)}, b);
    int64_t distance = a.size;
    for (uint8_t step : steps_) distance += int64_t(step & 1) - int64_t(step >> 1);
    return distance;
  }

 private:
  enum Step : uint8_t { kUp = 1, kDown = 2 };

  // `up` and `down`: in which rows the distance grows, or falls, by one from the row above.
  void band(Span rows, Span columns) {
    for (int64_t i = 0; i < rows.size; i++) rows_of_[rows.tokens[i]] |= uint64_t(1) << i;
    uint64_t up = ~uint64_t(0), down = 0;
    const int last = static_cast<int>(rows.size - 1);
    for (int64_t j = 0; j < columns.size; j++) {
      const uint64_t above_up = steps_[j] & 1, above_down = steps_[j] >> 1;
      const uint64_t same = rows_of_[columns.tokens[j]], vertical = same | down, equal = same | above_down;
      const uint64_t horizontal = (((equal & up) + up) ^ up) | equal;
      uint64_t right_up = down | ~(horizontal | up), right_down = up & horizontal;
      steps_[j] = static_cast<uint8_t>((right_up >> last & 1) | (right_down >> last & 1) << 1);
      right_up = right_up << 1 | above_up;
      right_down = right_down << 1 | above_down;
      up = right_down | ~(vertical | right_up);
      down = right_up & vertical;
    }
    for (int64_t i = 0; i < rows.size; i++) rows_of_[rows.tokens[i]] = 0;
  }

  std::vector<uint64_t> rows_of_;  // by token: in which rows of the band it is
  std::vector<uint8_t> steps_;  // by column: how the distance changes along the row above the band
};

template <class T> void run(const EditArgs<T>& a) {
  for_prompts(a.of, kTokensPerTask, [&](int64_t begin, int64_t end) {
    PromptTokens prompt;
    Distance distance;
    for (int64_t p = begin; p < end; p++) {
      prompt.read(a.of, p);
      distance.set_vocabulary(prompt.interner.size());
      const int64_t responses = prompt.responses();
      const auto span = [&](int64_t k) { return Span{prompt.tokens.data() + prompt.begins[k], prompt.length(k)}; };
      double sum = 0;
      for (int64_t i = 0; i < responses; i++)
        for (int64_t j = i + 1; j < responses; j++) {
          const double d = double(distance(span(i), span(j)));
          sum += a.normalize ? d / double(std::max<int64_t>(1, std::max(prompt.length(i), prompt.length(j)))) : d;
        }
      const double pairs = double(responses) * double(responses - 1) / 2;
      a.of.result[p] = responses < 2 ? std::numeric_limits<double>::quiet_NaN() : sum / pairs;
    }
  });
}

}  // namespace

void cpu_edit_distance(const EditArgs<int32_t>& args) { run(args); }
void cpu_edit_distance(const EditArgs<int64_t>& args) { run(args); }

}  // namespace prefkern
