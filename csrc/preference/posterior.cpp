// The CPU walk of posterior.h, in double.
#include "preference/posterior.h"

#include "core/parallel.h"
#include "math/preference.h"

namespace prefkern {
namespace {

template <class S> void run(const PosteriorArgs<S>& a) {
  parallel_for(0, a.pairs, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      a.posterior[i] = S(label_posterior(double(a.margin[i]), double(a.reliability[a.annotator ? a.annotator[i] : 0])));
  });
}

}  // namespace

void cpu_label_posterior(const PosteriorArgs<float>& args) { run(args); }
void cpu_label_posterior(const PosteriorArgs<double>& args) { run(args); }

}  // namespace prefkern
