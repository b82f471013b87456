// CPU entry points of clean_latents.h: pick the instruction set, share the slices out over torch's threads, and finish in the
// order of the rows and their slices.
#include "diffusion/clean_latents.h"

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "diffusion/clean_latents_cpu.h"

namespace prefkern {

PK_ISA_TABLE(CleanLatentsCpu, clean_latents_cpu)

namespace {

template <class Args> void run(const Args& args, void (*body)(const Args&, int64_t, int64_t)) {
  const int64_t slices = ceil_div(args.length, kCpuSlice);
  const int64_t grain = std::max<int64_t>(1, kCpuSlice / std::max<int64_t>(1, args.length));
  parallel_for(0, args.rows * slices, grain, [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

template <class S> void finish(const X0LossArgs<S>& a) {
  const int64_t slices = ceil_div(a.length, kCpuSlice);
  double total = 0;
  for (int64_t b = 0; b < a.rows; b++) {
    double sum = 0;
    for (int64_t i = b * slices; i < (b + 1) * slices; i++) sum += a.sums[i];
    const double loss = sum / double(a.length);
    if (a.reduction == LatentReduction::none) a.loss[b] = S(loss);
    total += loss;
  }
  if (a.reduction != LatentReduction::none) *a.loss = S(a.reduction == LatentReduction::mean ? total / double(a.rows) : total);
}

}  // namespace

void cpu_x0_loss(const X0LossArgs<float>& args) {
  if (args.rows == 0) return;
  run(args, clean_latents_cpu().sums_f32);
  finish(args);
}
void cpu_x0_loss(const X0LossArgs<double>& args) {
  if (args.rows == 0) return;
  run(args, clean_latents_cpu().sums_f64);
  finish(args);
}
void cpu_x0_loss_backward(const X0GradArgs<float>& args) { run(args, clean_latents_cpu().gradient_f32); }
void cpu_x0_loss_backward(const X0GradArgs<double>& args) { run(args, clean_latents_cpu().gradient_f64); }
void cpu_latent_step(const LatentStepArgs& args) { run(args, clean_latents_cpu().step); }

}  // namespace prefkern
