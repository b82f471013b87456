// Distinct keys of 64 bits as numbers 0, 1, 2, ..., in the order in which they first come. Exact: two keys have one number only
// if they are equal, whatever their hashes are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace prefkern {

class Interner {
 public:
  // Forgets everything, and makes room for so many distinct keys.
  void reset(int64_t at_most) {
    int bits = 4;
    while ((int64_t(1) << bits) < 2 * at_most) bits++;
    shift_ = 64 - bits;
    mask_ = (uint64_t(1) << bits) - 1;
    slots_.assign(mask_ + 1, kFree);
    keys_.clear();
    keys_.reserve(at_most);
  }

  uint32_t operator()(uint64_t key) {
    // The upper half of a key reaches the upper bits of the product only through its lower ones: fold it in first.
    for (uint64_t at = ((key ^ (key >> 31)) * 0x9E3779B97F4A7C15u) >> shift_;; at = (at + 1) & mask_) {
      const uint32_t number = slots_[at];
      if (number == kFree) {
        slots_[at] = static_cast<uint32_t>(keys_.size());
        keys_.push_back(key);
        return slots_[at];
      }
      if (keys_[number] == key) return number;
    }
  }

  int64_t size() const { return static_cast<int64_t>(keys_.size()); }

 private:
  static constexpr uint32_t kFree = ~uint32_t(0);
  int shift_ = 60;
  uint64_t mask_ = 0;
  std::vector<uint32_t> slots_;
  std::vector<uint64_t> keys_;
};

}  // namespace prefkern
